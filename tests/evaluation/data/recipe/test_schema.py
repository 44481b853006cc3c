import pytest
import yaml

from flexolmo_hf.errors import ConfigurationError, DamagedFileError
from flexolmo_hf.evaluation.data.recipe import FLEXMIX, read_recipe

# Billions of tokens, from the paper (arXiv 2507.07024).
PAPER = {
    "public": 2370,
    "news": 158,
    "creative": 202,
    "math": 20.3,
    "code": 83,
    "academic": 58.6,
    "educational": 102,
    "reddit": 9.9,
}


def test_the_committed_recipe_wants_the_tokens_of_the_paper():
    assert {domain.name: domain.tokens / 1e9 for domain in read_recipe(FLEXMIX).domains} == PAPER


def test_every_source_of_the_committed_recipe_names_its_repository_and_licence():
    for source in read_recipe(FLEXMIX).sources:
        assert source.repository.count("/") == 1
        assert source.licence


def test_what_the_public_classifier_drops_is_what_owners_take():
    recipe = read_recipe(FLEXMIX)
    classified = {domain.name: domain.sources[0].classify for domain in recipe.domains if domain.sources[0].classify}

    assert set(classified["public"].but) == set(classified["news"].labels + classified["creative"].labels)
    assert recipe.domains[-1].name == "public"


def test_every_setting_changes_the_fingerprint(recipe):
    first = read_recipe(recipe())

    assert read_recipe(recipe()).fingerprint() == first.fingerprint()
    assert read_recipe(recipe({"seed": 1})).fingerprint() != first.fingerprint()
    assert read_recipe(recipe(filters=[{"length": {"min": 2}}])).fingerprint() != first.fingerprint()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shufle_rows": 3}, "Did you mean 'shuffle_rows'"),
        ({"documents": 0}, "documents is 0"),
        ({"repetition_error": 1.0}, "between 0 and 1"),
        ({"seed": "0"}, "seed is str, not int"),
        ({"domains": {}}, "has no domains"),
        ({"domains": {"math": {"tokens": "2e9", "sources": {}}}}, "tokens is str, not int"),
        ({"domains": {"math": {"tokens": 1, "sources": {}}}}, "has no sources"),
        ({"domains": {"../math": {"tokens": 1, "sources": {}}}}, "cannot be a name"),
    ],
    ids=str,
)
def test_a_recipe_that_makes_no_sense_is_refused(recipe, changes, says):
    path = recipe()
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))

    with pytest.raises(ConfigurationError, match=says):
        read_recipe(path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"repositry": "x"}, "Did you mean 'repository'"),
        ({"text": None}, "neither text and thread"),
        ({"thread": {"title": "t", "body": "b", "answers": "a"}}, "both text and thread"),
        ({"weight": 0}, "weight of problems is 0"),
        ({"weight": True}, "weight is bool, not float"),
        ({"filters": {"length": {}}}, "not a list"),
        ({"filters": [{"lenght": {}}]}, "Did you mean 'length'"),
        ({"classify": {"model": "m"}}, "either labels or but"),
        ({"rewrite": {"prompt": "Write it anew."}}, "no place for the text"),
        ({"rewrite": {"model": "m"}}, "does not say prompt"),
        ({"reader": "script"}, "reader: json or parquet"),
    ],
    ids=str,
)
def test_a_source_that_makes_no_sense_is_refused(recipe, changes, says):
    path = recipe(**changes)

    with pytest.raises(ConfigurationError, match=says):
        read_recipe(path)


def test_one_name_for_two_sources_is_refused(recipe):
    source = {"repository": "owner/problems", "licence": "MIT", "text": "text"}
    domains = {name: {"tokens": 10, "sources": {"problems": source}} for name in ("math", "code")}

    with pytest.raises(ConfigurationError, match="Several sources are called 'problems'"):
        read_recipe(recipe({"domains": domains}))


def test_a_name_that_comes_twice_in_one_place_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: a\ndomains:\n  math: {tokens: 1}\n  math: {tokens: 2}\n")

    with pytest.raises(ConfigurationError, match="says 'math' twice"):
        read_recipe(tmp_path / "recipe.yaml")


def test_a_missing_recipe_is_refused_by_its_last_name(tmp_path):
    with pytest.raises(ConfigurationError, match="'none.yaml'") as refused:
        read_recipe(tmp_path / "none.yaml")

    assert str(tmp_path) not in str(refused.value)


@pytest.mark.parametrize("text", ["a: [", "!!python/object/apply:os.getcwd []"], ids=["torn", "code"])
def test_a_file_that_is_not_plain_yaml_is_refused(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)

    with pytest.raises(DamagedFileError):
        read_recipe(tmp_path / "recipe.yaml")


def test_a_recipe_that_is_a_list_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text("- a\n")

    with pytest.raises(ConfigurationError, match="not a mapping"):
        read_recipe(tmp_path / "recipe.yaml")
