"""The five data sets of SciRIFF that the suite asks for, picked out of all 54 by how a row's identifier begins."""

from datasets import Dataset


def _only(rows: Dataset, name: str) -> Dataset:
    # An identifier is name:split:number.
    return rows.filter(lambda identifier: identifier.startswith(f"{name}:"), input_columns="_instance_id")


def bioasq_factoid(rows: Dataset) -> Dataset:
    """Keep questions of BioASQ that ask for a name or number."""
    return _only(rows, "bioasq_factoid_qa")


def bioasq_general(rows: Dataset) -> Dataset:
    """Keep questions of BioASQ that ask for a summary."""
    return _only(rows, "bioasq_general_qa")


def bioasq_yesno(rows: Dataset) -> Dataset:
    """Keep questions of BioASQ to be answered by yes or no."""
    return _only(rows, "bioasq_yesno_qa")


def pubmedqa(rows: Dataset) -> Dataset:
    """Keep PubMedQA: yes, no or maybe."""
    return _only(rows, "pubmedqa_qa")


def covidqa(rows: Dataset) -> Dataset:
    """Keep COVID-QA: an answer quoted from a paper."""
    return _only(rows, "covid_deepset_qa")
