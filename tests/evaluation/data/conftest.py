from tests.demo.conftest import wheels  # noqa: F401 (a fixture)
