import email

import pytest

from flexolmo_hf.evaluation.data.sources.mail import MASK, clean_body, mask_addresses, own_words, subject


@pytest.mark.parametrize(
    "body",
    [
        "> Is it?\n>> Was it?\nIt is.",
        "On Monday, Tom wrote:\n> Is it?\nIt is.",
        "On Mon, 2 Sep 2002 at 10:00:00 +0100, Tom Smith\n<tom@example.com> wrote:\n\n> Is it?\n\nIt is.",
        "Tom> Is it?\nIt is.",
        "| Is it?\n: Is it?\nIt is.",
        "It is.\n-- \nTom\nhttp://example.com",
        "It is.\n_______________________________________________\nlist mailing list",
        "It is.\n-----Original Message-----\nFrom: Tom\nIs it?",
        "It is.\n\nTom Smith said:\n",
    ],
)
def test_only_the_senders_own_words_stay(body):
    assert clean_body(body) == "It is."


def test_text_around_a_quote_stays_in_order_with_its_paragraphs():
    body = "Hello,\n\n\n\nfirst:\n> Is it?\nYes - it is.\n  indented -- dash\n"

    assert clean_body(body) == "Hello,\n\nfirst:\nYes - it is.\n  indented -- dash"


@pytest.mark.parametrize("address", ["tom@example.com", "tom.smith+list@mail.example.co.uk", "o'x_y-z@a-b.org"])
def test_addresses_are_masked_and_the_rest_stays(address):
    masked = mask_addresses(f"Write to <{address}>, or to @home.")

    assert "@" not in masked.replace("@home", "")
    assert masked.endswith(f"{MASK}>, or to @home.")


@pytest.mark.parametrize("text", ["Re: [ILUG] Beer", "RE: Re: Beer", "Fwd: Beer", "[ILUG] Re[2]: Beer", " Beer "])
def test_posts_of_one_thread_have_one_subject(text):
    assert subject(email.message_from_string(f"Subject: {text}\n\n")) == "Beer"


def test_attachments_and_html_are_no_words():
    message = email.message_from_string(
        "MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=x\n\n"
        "--x\nContent-Type: text/plain; charset=iso-8859-1\nContent-Transfer-Encoding: quoted-printable\n\nCaf=E9.\n"
        "--x\nContent-Type: text/html\n\n<b>Shop</b>\n"
        "--x\nContent-Type: text/plain\nContent-Disposition: attachment; filename=a.txt\n\nAttached\n--x--\n"
    )

    assert own_words(message) == "Café."


def test_unknown_character_set_is_no_obstacle():
    assert own_words(email.message_from_string("Content-Type: text/plain; charset=x-none\n\nHello.")) == "Hello."
