"""What is silenced, and what is not."""

import os

from nni_haloc.utils.quiet import without_prints


def test_prints_of_compiled_code_are_dropped_for_the_block_alone(capfd):
    os.write(1, b"before ")
    with without_prints():
        os.write(1, b"within ")
    print("after", end="")
    assert capfd.readouterr().out == "before after"


def test_a_block_that_fails_gives_the_output_back(capfd):
    try:
        with without_prints():
            raise ValueError
    except ValueError:
        print("after", end="")
    assert capfd.readouterr().out == "after"


def test_a_process_without_standard_output_goes_on():
    kept = os.dup(1)
    os.close(1)
    try:
        with without_prints():
            done = True
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert done
