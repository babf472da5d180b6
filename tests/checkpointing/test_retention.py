import math

from lightning_align.checkpointing.retention import Retention


def saved(retention: Retention, **scores: float | None) -> list[str]:
    """Save one after the other; returns what was given up."""
    given_up = []
    for name, score in scores.items():
        retention.begin(name, score)
        given_up += retention.commit(name)
    return given_up


def test_the_best_two_by_score_are_kept() -> None:
    retention = Retention(2, "min", keep_newest=False)
    assert saved(retention, a=3.0, b=1.0, c=2.0) == ["a"]
    assert list(retention.ranked) == ["b", "c"]
    assert retention.admits(1.5)
    assert not retention.admits(2.0), "as ModelCheckpoint: an equal score is not better"


def test_max_and_nan() -> None:
    retention = Retention(1, "max", keep_newest=False)
    assert saved(retention, a=math.nan, b=0.5) == ["a"]
    assert not retention.admits(math.nan)
    assert retention.admits(0.6)


def test_all_or_none() -> None:
    everything, nothing = Retention(-1, "min", False), Retention(0, "min", False)
    assert saved(everything, a=1.0, b=2.0) == []
    assert everything.admits(9.0)
    assert not nothing.admits(9.0)


def test_newest_is_kept_besides_the_best() -> None:
    retention = Retention(1, "min", keep_newest=True)
    assert saved(retention, a=1.0, b=None) == []
    assert (list(retention.ranked), retention.newest) == (["a"], "b")
    assert saved(retention, c=None) == ["b"]
    assert saved(retention, d=0.5) == ["a", "c"]


def test_nothing_is_given_up_before_the_commit_and_nothing_for_what_failed() -> None:
    retention = Retention(1, "min", keep_newest=False)
    saved(retention, a=1.0)
    retention.begin("b", 0.5)
    assert list(retention.ranked) == ["a"]
    assert not retention.admits(0.7), "what is being written takes part in the decision"
    retention.drop("b")
    assert retention.admits(0.7)
    assert saved(retention, c=0.7) == ["a"]


def test_a_protected_one_is_never_given_up() -> None:
    retention = Retention(1, "min", keep_newest=False)
    retention.protect("a")
    assert saved(retention, a=1.0, b=0.5, c=0.1) == ["b"]


def test_what_was_pending_is_taken_over_if_it_was_committed_meanwhile() -> None:
    """A checkpoint names itself as pending; if it can be read it was committed."""
    before = Retention(1, "min", keep_newest=False)
    saved(before, a=1.0)
    before.begin("b", 0.5)
    after, late = (Retention(1, "min", keep_newest=False) for _ in range(2))
    assert after.load_state_dict(before.state_dict(), {"a", "b"}) == ["a"]
    assert (list(after.ranked), after.newest) == (["b"], "b")
    assert late.load_state_dict(before.state_dict(), {"a"}) == []
    assert (list(late.ranked), late.newest) == (["a"], "a")


def test_what_was_abandoned_goes_when_its_step_is_committed_again() -> None:
    retention = Retention(2, "min", keep_newest=False)
    saved(retention, a=1.0, b=0.5)
    retention.abandon({"b": 60, "c": 80})
    assert list(retention.ranked) == ["a"], "what was left behind is not the best"
    retention.begin("d", 0.7)
    assert retention.commit("d", 59) == []
    retention.begin("e", 0.9)
    assert retention.commit("e", 60) == ["a", "b"]
    retention.begin("f", 0.1)
    assert retention.commit("f", 100) == ["e", "c"]


def test_what_was_abandoned_stays_where_all_are_kept_and_where_it_is_protected() -> None:
    everything, one = Retention(-1, "min", False), Retention(1, "min", False)
    one.protect("a")
    for retention in (everything, one):
        retention.abandon({"a": 1})
        retention.begin("b", 1.0)
        assert retention.commit("b", 9) == []


def test_a_state_from_before_does_not_bring_back_what_was_abandoned() -> None:
    before, after = (Retention(2, "min", keep_newest=False) for _ in range(2))
    saved(before, a=1.0, b=0.5)
    after.abandon({"b": 60})
    after.load_state_dict(before.state_dict(), {"a", "b"})
    assert list(after.ranked) == ["a"]
    assert after.newest == "a"


def test_what_was_withdrawn_is_neither_best_nor_newest_and_goes_with_the_next_commit() -> None:
    for top_k in (1, -1):
        retention = Retention(top_k, "min", keep_newest=True)
        saved(retention, a=1.0, b=0.5 if top_k < 0 else None)
        retention.withdraw(["b"])
        assert (list(retention.ranked), retention.newest) == (["a"], "a")
        assert retention.latest_score == 1.0
        assert retention.state_dict()["stored"] == ["a"]
        retention.begin("c", 0.7)
        assert "b" in retention.commit("c"), "even where all are kept"
        assert saved(retention, d=0.1) == ([] if top_k < 0 else ["c"])


def test_what_is_being_written_when_it_is_withdrawn_goes_with_the_commit_behind_its_own() -> None:
    retention = Retention(1, "min", keep_newest=True)
    saved(retention, a=1.0)
    retention.begin("b", 0.5)
    retention.withdraw(["b"])
    assert retention.admits(0.9), "it is no rival"
    assert retention.state_dict()["pending"] == {}
    retention.begin("c", 0.9)
    assert retention.expected().newest == "c"
    assert retention.commit("b") == []
    assert (list(retention.ranked), retention.newest) == (["a"], "a")
    assert set(retention.commit("c")) == {"a", "b"}
    retention.begin("d", 0.1)
    retention.withdraw(["d"])
    retention.drop("d")  # it failed
    assert saved(retention, e=0.1) == ["c"]


def test_withdrawn_ones_are_not_taken_up_again_and_a_loaded_one_stays() -> None:
    before, after = (Retention(-1, "min", keep_newest=True) for _ in range(2))
    saved(before, a=1.0, b=0.5, c=0.2)
    after.withdraw(["b", "c"])
    after.protect("c")
    after.load_state_dict(before.state_dict(), {"a", "b", "c"})
    assert list(after.ranked) == ["a"]
    assert saved(after, d=0.1) == ["b"]
