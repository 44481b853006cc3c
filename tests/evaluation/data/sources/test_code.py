from flexolmo_hf.evaluation.data.sources.code import standard_library


def test_standard_library_holds_no_tests_packages_or_tables(tmp_path):
    for path in ("json/decoder.py", "os.py", "test/test_os.py", "json/tests/x.py", "site-packages/numpy.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"# {path}\n")
    (tmp_path / "_sysconfigdata__linux.py").write_text("build_time_vars = {}\n")
    (tmp_path / "empty.py").write_text("")

    assert standard_library(tmp_path) == ["# json/decoder.py\n", "# os.py\n"]


def test_long_module_ends_at_a_line(tmp_path):
    (tmp_path / "long.py").write_text("x = 1  # one line\n" * 2000)

    [text] = standard_library(tmp_path)

    assert 11_900 < len(text) <= 12_000
    assert text.endswith("# one line\n")


def test_running_interpreter_has_enough_modules():
    texts = standard_library()

    assert len(texts) > 300
    assert sum(map(len, texts)) > 2_000_000
