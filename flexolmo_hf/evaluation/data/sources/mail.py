"""What one person wrote in an e-mail: quotes, attributions, signatures and footers go, addresses are masked."""

import re
from email.message import Message

#: What stands for an e-mail address; a token of its own in OLMo 2's vocabulary.
MASK = "|||EMAIL_ADDRESS|||"

_ADDRESS = re.compile(r"[\w.+%-]+@[\w-]+(?:\.[\w-]+)+")
# "> text", "| text", "Tom> text", and a colon or a brace as some programs put it.
_QUOTE = re.compile(r"\s*(?:[>|}:]|[\w-]{1,8}>)")
# "-- " before a signature, a long rule before a list's footer or a forwarded message.
_END = re.compile(
    r"-- ?$|\s*[_=*~-]{20,}|-+ ?(?:Original|Forwarded) Message|_{5,}|Sent from |To unsubscribe|Yahoo! Groups"
)
_WROTE = re.compile(r"(?:wrote|writes|said|schrieb)(?: on [^:]*)?:?\s*$", re.IGNORECASE)
_ATTRIBUTION = re.compile(r"(?:On |At |In a message |In article |Quoting |\W*\w[^.!?]{0,60}[<(])", re.IGNORECASE)
_PREFIX = re.compile(r"^(?:\s*(?:re|fwd?|aw|sv)(?:\[\d+\])?:|\s*\[[^\]]{1,40}\])+\s*", re.IGNORECASE)


def subject(message: Message) -> str:
    """Return the subject without "Re:" and the names of lists: the same for a whole thread."""
    return re.sub(r"\s+", " ", _PREFIX.sub("", str(message.get("Subject") or ""))).strip()


def own_words(message: Message) -> str:
    """Return what the sender wrote, as plain text; empty where there is none."""
    body = "\n".join(_decoded(part) for part in message.walk() if _is_text(part))
    return mask_addresses(clean_body(body))


def mask_addresses(text: str) -> str:
    """Put `MASK` in the place of every e-mail address."""
    return _ADDRESS.sub(MASK, text)


def clean_body(body: str) -> str:
    """Drop quotes, the lines that announce them, and everything from the signature on."""
    kept: list[str] = []
    for line in body.replace("\ufffd", "").splitlines():
        if _END.match(line):
            break
        if _QUOTE.match(line):
            _drop_attribution(kept)
        else:
            kept.append(line.rstrip())
    _drop_attribution(kept)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def _drop_attribution(kept: list[str]) -> None:
    """Drop "On Monday, Tom wrote:" from the end, in one line or two, and the blank lines after it."""
    end = len(kept)
    while end and not kept[end - 1]:
        end -= 1
    if end and _WROTE.search(kept[end - 1]):
        begin = end - 1
        if begin and not _ATTRIBUTION.match(kept[begin]) and _ATTRIBUTION.match(kept[begin - 1]):
            begin -= 1
        del kept[begin:]


def _is_text(part: Message) -> bool:
    return part.get_content_type() == "text/plain" and not part.get_filename()


def _decoded(part: Message) -> str:
    content = part.get_payload(decode=True)
    if not isinstance(content, bytes):
        return ""
    try:
        return content.decode(part.get_content_charset() or "latin1", "replace")
    except LookupError:
        return content.decode("latin1")
