import io
import tarfile

from flexolmo_hf.evaluation.data.sources.forum import threads
from flexolmo_hf.evaluation.data.sources.mail import MASK

WORDS = "This is what I think about it, and I have thought about it for quite some time."


def package(path, **posts):
    """An npm package; each post is (folder, headers, body)."""
    with tarfile.open(path, "w:gz") as archive:
        for name, (folder, headers, body) in posts.items():
            content = f"{headers}\n\n{body}\n".encode()
            for suffix in ("txt", "json"):
                member = tarfile.TarInfo(f"package/data/{folder}/{name}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def test_posts_of_a_thread_are_one_document_in_the_order_of_their_names(tmp_path):
    tarball = package(
        tmp_path / "mail.tgz",
        b=("hard-ham-1", "Subject: Re: [x] beer", f"> Which?\n{WORDS} B"),
        a=("easy-ham-1", "Subject: [x] Beer", f"{WORDS} A"),
        c=("easy-ham-2", "Subject: Wine", f"{WORDS} tom@example.com"),
    )

    assert threads(tarball) == [[f"Beer\n{WORDS} A", f"beer\n{WORDS} B"], [f"Wine\n{WORDS} {MASK}"]]


def test_spam_feeds_short_and_endless_mail_are_left_out(tmp_path):
    tarball = package(
        tmp_path / "mail.tgz",
        spam=("spam-1", "Subject: Buy", WORDS),
        feed=("easy-ham-1", "From: News <rssfeeds@example.com>\nSubject: News", WORDS),
        short=("easy-ham-1", "Subject: Me", "Me too."),
        digest=("easy-ham-1", "Subject: All", "line of text\n" * 3000),
    )

    assert threads(tarball) == []


def test_posts_without_a_subject_are_threads_of_their_own(tmp_path):
    tarball = package(tmp_path / "mail.tgz", a=("easy-ham-1", "Subject:", WORDS), b=("easy-ham-1", "X: y", WORDS))

    assert threads(tarball) == [[WORDS], [WORDS]]


def test_address_in_a_subject_is_masked(tmp_path):
    tarball = package(tmp_path / "mail.tgz", a=("easy-ham-1", "Subject: Ask tom@example.com", WORDS))

    assert threads(tarball) == [[f"Ask {MASK}\n{WORDS}"]]
