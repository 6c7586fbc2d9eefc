"""Every reader, a few bad inputs each; `make fuzz` tries a hundred thousand."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS

_EXAMPLES = {"config-file": 12, "command-line": 12, "zip": 60, "scene": 40, "label-raster": 40}


@pytest.fixture(scope="module", params=list(TARGETS))
def target(request, tmp_path_factory):
    made = TARGETS[request.param](tmp_path_factory.mktemp(request.param))
    return request.param, made


def test_a_reader_is_right_or_refuses(target):
    name, made = target
    for seed in made.seeds:
        made.run(seed)

    @settings(
        max_examples=_EXAMPLES.get(name, 120),
        print_blob=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    @given(st.binary(max_size=64))
    def try_some(program: bytes) -> None:
        made.run(made.mutate(made.seeds, program))

    try_some()
