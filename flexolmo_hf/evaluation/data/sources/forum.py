"""Forum: posts to mailing lists in 2002, the wanted mail of the SpamAssassin corpus.

The package calls itself public domain, which is doubtful for letters of so many people: to use, never to pass on.
"""

import email
import re
import tarfile
from pathlib import Path

from flexolmo_hf.evaluation.data.sources.mail import mask_addresses, own_words, subject

_POST = re.compile(r"package/data/(?:easy|hard)-ham-\d/[^/]+\.txt")
# Items of news feeds that someone had sent to himself.
_FEED = "rssfeeds@"
_SHORTEST, _LONGEST = 60, 35_000


def threads(tarball: Path) -> list[list[str]]:
    """Read what people wrote, the posts of a thread together, each under its subject.

    Returns:
        One list of posts per thread. Quotes, signatures and footers are gone and addresses are masked; posts of fewer
        than 60 or more than 35,000 characters (digests) and news feeds are left out.
    """
    found: dict[str, list[str]] = {}
    with tarfile.open(tarball) as archive:
        raw = {member.name: _bytes(archive, member) for member in archive if _POST.fullmatch(member.name)}
    for name in sorted(raw):
        message = email.message_from_bytes(raw[name])
        words, title = own_words(message), mask_addresses(subject(message))
        if _FEED not in str(message.get("From")) and _SHORTEST <= len(words) <= _LONGEST:
            # Without a subject, a post is a thread of its own.
            found.setdefault(title.lower() or name, []).append(f"{title}\n{words}".strip())
    return list(found.values())


def _bytes(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None
    return file.read()
