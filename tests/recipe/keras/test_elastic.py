"""Elastic training under the real launcher: one of two ranks gets SIGKILL."""

import json
import subprocess
import sys

import pytest

from tests.ranks import BIN, ROOT, environment

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_a_killed_rank_is_survived(tmp_path, backend):
    """The other goes on alone from the last commit.

    Every one of the 12 steps is done, none twice.
    """
    hosts = tmp_path / "hosts"
    hosts.write_text(
        "#!/bin/sh\necho localhost:1\necho 127.0.0.1:1\n"
    )  # two names, as a kill blacklists one
    hosts.chmod(0o755)
    elastic = ["-np", "2", "--min-np", "1", "--max-np", "2", "--host-discovery-script", str(hosts)]
    done = subprocess.run(
        [
            *(str(BIN / "horovodrun"), "--gloo", "--network-interfaces", "lo", *elastic),
            *(sys.executable, str(ROOT / "tests/recipe/keras/elastic_program.py"), str(tmp_path)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
        cwd=ROOT,
        env=environment(KERAS_BACKEND=backend),
        check=False,
    )
    assert (tmp_path / "0.json").exists(), done.stdout[-4000:]
    found = json.loads((tmp_path / "0.json").read_text())
    steps = [
        step
        for i, (*_, step) in enumerate(found["path"])
        if i == 0 or step != found["path"][i - 1][3]
    ]
    assert steps == list(range(1, 13))
    assert [size for size, *_ in found["path"]][:6] == [2] * 6
    assert found["path"][-1] == [1, 2, 3, 12]
    assert (found["epoch"], found["batch"]) == (3, 0)
