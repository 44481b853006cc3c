"""A contract says what leaving an expert out may do, and is broken by evidence and by nothing else."""

import math

import pytest
import yaml

from flexolmo_hf.errors import ConfigurationError, DamagedFileError, UnknownExpertError
from flexolmo_hf.evaluation.optout import ALL, Contract, Terms
from tests.evaluation.optout.made import CHANGES, made

EACH = Terms(own_loses=5, others_change=1, public_changes=0.5)


def verdicts(contract, matrix):
    return {(clause.set, clause.data): clause.verdict for clause in contract.check(matrix)}


def changed(label, data, percent):
    return {**CHANGES, label: {**CHANGES[label], data: percent}}


def test_terms_of_each_expert_hold_for_all_but_public():
    found = verdicts(Contract(each=EACH), made())

    assert found == {
        ("without math", "public"): "kept",
        ("without math", "math"): "kept",
        ("without math", "code"): "kept",
        ("without code", "public"): "kept",
        ("without code", "math"): "kept",
        ("without code", "code"): "kept",
    }


@pytest.mark.parametrize(
    ("data", "percent"),
    [("math", 4.9), ("math", -12), ("code", 1.1), ("code", -1.1), ("public", 0.6), ("public", -0.6)],
)
def test_each_kind_of_term_is_broken_by_a_change_beyond_it_and_by_no_other(data, percent):
    found = verdicts(Contract(each=EACH), made(changed("without math", data, percent)))

    assert [at for at, verdict in found.items() if verdict == "broken"] == [("without math", data)]


def test_public_data_follow_the_term_of_others_where_they_have_none_of_their_own():
    contract = Contract(each=Terms(others_change=0.3))

    assert verdicts(contract, made(changed("without math", "public", 0.4)))["without math", "public"] == "broken"


def test_an_experts_own_terms_replace_those_of_each_one_by_one():
    contract = Contract(each=EACH, experts={"math": Terms(own_loses=15), "public": Terms(own_loses=50)})
    found = {(clause.set, clause.data): (clause.limit, clause.verdict) for clause in contract.check(made())}

    assert found["without math", "math"] == (15, "broken")
    assert found["without math", "code"] == (1, "kept")
    assert found["without code", "code"] == (5, "kept")
    assert found["without public", "public"] == (50, "broken")


def test_bits_per_byte_are_held_against_their_limit_by_set():
    contract = Contract(bits_per_byte={ALL: {"math": 1.99, "code": 2.01}, "math+public": {"math": 2.5}})
    found = {(clause.set, clause.data): (clause.verdict, clause.measured) for clause in contract.check(made())}

    assert found[ALL, "math"][0] == "broken"
    assert found[ALL, "code"][0] == "kept"
    assert found["without code", "math"] == ("kept", pytest.approx(2.006))
    assert contract.subsets == ["math+public"]


@pytest.mark.parametrize(("decided_by", "verdict"), [("interval", "unsure"), ("value", "broken")])
def test_what_chance_may_have_done_breaks_a_contract_only_if_the_value_decides(decided_by, verdict):
    matrix = made(changed("without math", "math", 4.9), spread=3)
    contract = Contract(each=EACH, decided_by=decided_by)

    assert verdicts(contract, matrix)["without math", "math"] == verdict


@pytest.mark.parametrize(("decided_by", "verdict"), [("interval", "unsure"), ("value", "broken")])
@pytest.mark.parametrize("percent", [1.1, -1.1])
def test_either_way_an_interval_that_reaches_what_was_agreed_breaks_nothing(percent, decided_by, verdict):
    matrix = made(changed("without math", "code", percent), spread=3)
    found = verdicts(Contract(each=Terms(others_change=1), decided_by=decided_by), matrix)

    assert found["without math", "code"] == verdict


@pytest.mark.parametrize(("decided_by", "verdict"), [("interval", "unsure"), ("value", "broken")])
def test_bits_per_byte_whose_interval_reaches_what_was_agreed_break_nothing(decided_by, verdict):
    contract = Contract(bits_per_byte={"without code": {"math": 2.0}}, decided_by=decided_by)

    assert verdicts(contract, made(spread=3))["without code", "math"] == verdict


def test_what_is_not_a_number_keeps_no_promise():
    matrix = made(changed("without math", "code", math.nan))

    assert verdicts(Contract(each=EACH), matrix)["without math", "code"] == "broken"


def test_a_contract_of_what_was_measured_is_kept_by_it_and_broken_beyond_its_margin():
    matrix = made()
    contract = Contract.from_matrix(matrix, margin=0.5)
    assert {clause.verdict for clause in contract.check(matrix)} == {"kept"}
    assert contract.experts["math"] == Terms(own_loses=11.5, others_change=0.9, public_changes=0.7)
    assert contract.experts["public"] == Terms(own_loses=39.5, others_change=25.5)
    assert contract.bits_per_byte == {ALL: {"public": 2.01, "math": 2.01, "code": 2.01}}

    later = made(changed("without math", "math", 11.4))
    assert [(c.set, c.data) for c in contract.check(later) if c.verdict == "broken"] == [("without math", "math")]


def test_without_a_margin_rounding_breaks_no_contract():
    changes = {label: {data: value + 0.0049 for data, value in row.items()} for label, row in CHANGES.items()}
    changes["without math"]["math"] = 12.346
    matrix = made({ALL: dict.fromkeys(CHANGES["without math"], 0.00123), **changes})
    contract = Contract.from_matrix(matrix, margin=0)

    assert contract.experts["math"].own_loses <= 12.346
    assert {clause.verdict for clause in contract.check(matrix)} == {"kept"}


@pytest.mark.parametrize("margin", [-1, math.nan, math.inf])
def test_a_margin_with_which_nothing_could_be_kept_or_broken_is_refused(margin):
    with pytest.raises(ConfigurationError, match="margin is"):
        Contract.from_matrix(made(), margin=margin)


@pytest.mark.parametrize("percent", [math.nan, math.inf])
def test_no_contract_is_written_of_what_is_not_a_number(percent):
    with pytest.raises(ConfigurationError, match="bits per byte of 'code', without math, are no number"):
        Contract.from_matrix(made(changed("without math", "code", percent)))


def test_a_contract_is_the_same_after_being_written_and_read(tmp_path):
    contract = Contract.from_matrix(made())
    contract.save(tmp_path / "contract.yaml")

    assert Contract.load(tmp_path / "contract.yaml") == contract
    with pytest.raises(ConfigurationError, match="there already"):
        contract.save(tmp_path / "contract.yaml")


def test_every_part_of_a_contract_is_written(tmp_path):
    contract = Contract(EACH, {"math": Terms(own_loses=15)}, {"math+public": {"math": 2.5}}, "value")
    contract.save(tmp_path / "contract.yaml")

    assert Contract.load(tmp_path / "contract.yaml") == contract


def test_a_broken_clause_says_what_was_measured_and_what_was_agreed():
    broken = [
        str(clause)
        for clause in Contract(each=EACH, bits_per_byte={ALL: {"code": 1.5}}).check(
            made(changed("without math", "math", 3))
        )
        if clause.verdict == "broken"
    ]

    assert broken == [
        "broken: math changes by +3.00 % without math [+3.00, +3.00]; agreed: worse by at least 5 %",
        "broken: code needs 2.000 bits per byte with all experts [2.000, 2.000]; agreed: at most 1.5",
    ]


@pytest.mark.parametrize(
    ("contract", "error", "says"),
    [
        (Contract(experts={"maht": Terms(own_loses=1)}), UnknownExpertError, "Did you mean 'math'"),
        (Contract(bits_per_byte={ALL: {"news": 2}}), ConfigurationError, "data 'news'"),
        (Contract(bits_per_byte={"math": {"math": 2}}), ConfigurationError, "'math', which was not measured"),
        (Contract(bits_per_byte={"news": {"math": 2}}), UnknownExpertError, "'news'"),
        (Contract(), ConfigurationError, "says nothing"),
        (Contract(experts={"public": Terms(public_changes=1)}), ConfigurationError, "Write own_loses"),
    ],
)
def test_a_promise_that_cannot_be_checked_is_refused(contract, error, says):
    with pytest.raises(error, match=says):
        contract.check(made())


def test_an_expert_whose_own_data_are_not_there_is_refused_if_they_must_get_worse():
    without_code = {label: {"public": row["public"], "math": row["math"]} for label, row in CHANGES.items()}
    matrix = made({ALL: {"public": 0, "math": 0}, **without_code})

    with pytest.raises(ConfigurationError, match="data 'code'"):
        Contract(each=EACH).check(matrix)


def test_a_promise_about_public_data_that_are_not_there_is_refused():
    without_public = {label: {"math": row["math"], "code": row["code"]} for label, row in CHANGES.items()}
    matrix = made({ALL: {"math": 0, "code": 0}, **without_public})

    with pytest.raises(ConfigurationError, match="data 'public'"):
        Contract(each=Terms(own_loses=1, public_changes=1)).check(matrix)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("each: {own_lose: 1}", "Did you mean 'own_loses'"),
        ("everyone: {own_loses: 1}", "'everyone', which nothing reads"),
        ("each: {own_loses: much}", "own_loses: 'much'"),
        ("each: {own_loses: true}", "own_loses: True"),
        ("each: {own_loses: .nan}", "Write a number"),
        ("each: {others_change: -1}", "others_change: -1, and no change is smaller than 0"),
        ("experts: {math: {public_changes: -0.5}}", "math has public_changes: -0.5"),
        ("decided_by: chance", "'chance'"),
        ("- each", "no list of names"),
        ("experts: {1: {own_loses: 1}}", "no list of names"),
        ("bits_per_byte: {math: 2}", "no list of names"),
    ],
)
def test_a_file_that_says_what_no_contract_can_is_refused(tmp_path, text, says):
    (tmp_path / "contract.yaml").write_text(text)

    with pytest.raises(ConfigurationError, match=says):
        Contract.load(tmp_path / "contract.yaml")


def test_a_file_that_is_no_yaml_or_not_there_is_refused_without_its_content(tmp_path):
    (tmp_path / "contract.yaml").write_text("each:\nsecret: [}")

    with pytest.raises(DamagedFileError, match="not YAML from line 2 on") as caught:
        Contract.load(tmp_path / "contract.yaml")
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    with pytest.raises(ConfigurationError, match="no contract 'other.yaml'"):
        Contract.load(tmp_path / "other.yaml")


def test_the_example_in_the_manual_is_a_contract():
    from flexolmo_hf.evaluation.optout import contract as module

    example = module.__doc__.split("::\n")[1]
    found = module._read(yaml.safe_load(example))

    assert found.each == Terms(2.0, 1.0, 0.5)
    assert found.experts == {"math": Terms(own_loses=5.0)}
    assert found.bits_per_byte == {ALL: {"math": 1.95}}
