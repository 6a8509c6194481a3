"""What a listing says: whole, partial, foreign, and what is left over."""

from __future__ import annotations

from asyncckpt.steps import attempt_name, belongs_to, manifest_name, may_be_swept, read_listing, summarise

A1, A2, A3 = (attempt_name(sequence, 7) for sequence in (1, 2, 3))


def listing(*paths: str) -> dict[str, int]:
    return dict.fromkeys(paths, 1)


def test_a_step_is_committed_when_its_manifest_is_there() -> None:
    """Data and `.metadata` alone are a partial step."""
    steps = read_listing(
        listing(f"10/{A1}/__0_0.distcp", "10/.metadata", f"10/{manifest_name(1)}", f"20/{A2}/x", "20/.metadata")
    )
    found = summarise(steps)
    assert found.sequences == {10: 1}
    assert found.next_sequence == 3
    assert found.foreign == frozenset()


def test_the_highest_manifest_of_a_step_wins() -> None:
    """A crash while re-saving leaves two."""
    steps = read_listing(listing(f"10/{manifest_name(1)}", f"10/{manifest_name(3)}", f"10/{A1}/a", f"10/{A3}/a"))
    assert steps[10].sequence == 3
    assert steps[10].leftovers(3) == [[manifest_name(1)], [f"{A1}/a"]]


def test_stock_folders_are_foreign_and_ours_never_are() -> None:
    """Anything that is neither is ignored."""
    steps = read_listing(
        listing("5/.metadata", "5/__0_0.distcp", "6/__0_0.distcp", "7/notes.txt", "010/x", "a/1", f"8/{A1}/d")
    )
    assert summarise(steps).foreign == frozenset({5, 6})
    assert 10 not in steps


def test_leftovers_of_a_partial_step_never_leave_a_folder_that_reads_as_foreign() -> None:
    """`.metadata` goes before the data folder that marks the step as ours."""
    step = read_listing(listing(f"20/{A2}/x", "20/.metadata"))[20]
    assert step.leftovers(3) == [[".metadata"], [f"{A2}/x"]]


def test_data_that_may_still_commit_is_no_leftover() -> None:
    """Only what is below the newest committed sequence number is dead."""
    step = read_listing(listing(f"20/{A3}/x"))[20]
    assert step.leftovers(2) == []


def test_a_step_is_deleted_manifest_first_and_data_last() -> None:
    """A crash in between leaves a partial step."""
    step = read_listing(listing(f"10/{A1}/a", "10/.metadata", f"10/{manifest_name(1)}"))[10]
    assert step.in_deletion_order() == [[manifest_name(1)], [".metadata"], [f"{A1}/a"]]


def test_what_belongs_to_a_save_is_told_by_name() -> None:
    """Its own data, its manifest, and `.metadata`."""
    names = [f"{A1}/a", f"{A2}/a", manifest_name(1), manifest_name(2), ".metadata"]
    assert [name for name in names if belongs_to(name, 2)] == [f"{A2}/a", manifest_name(2), ".metadata"]


def test_what_may_be_swept_is_in_step_folders_and_of_attempts_that_are_over() -> None:
    """Nothing of a save in flight, and nothing that is not ours."""
    assert all(may_be_swept(path, 2) for path in ("10", f"10/{A1}", f"10/{A1}/__0_0.distcp", f"10/{A2}"))
    assert may_be_swept(f"10/{A3}", 2)  # nothing is in it, and a writer that needs it makes it again
    assert not any(may_be_swept(path, 2) for path in (f"10/{A3}/__0_0.distcp", "10/mine", "mine", "010", f"mine/{A1}"))
