from __future__ import annotations

import pickle

import numpy as np
import pytest
import yaml

from amod.entries import ClassOnly, Merge, Prune, Route
from amod.errors import UserError
from amod.plan import as_data, check_plan, from_data, make_plan, read_plan, routed_blocks


@pytest.mark.parametrize(
    ("capacity", "tokens", "kept"),
    [
        (0.125, 197, 24),  # 24.625
        (0.5, 197, 98),  # 98.5
        (0.125, 50, 6),  # 6.25
        (1, 197, 197),
        (0.29, 100, 29),  # 0.29 * 100 is 28.999999999999996 in floating point
        (0.7, 10, 7),
        (1 / 197, 197, 1),
    ],
)
def test_k_is_the_floor(capacity, tokens, kept):
    assert Route(capacity).kept(tokens) == kept


@pytest.mark.parametrize("capacity", [0, -1, 2, 1.0001, float("nan"), float("inf"), "abc", None, True, 0.005])
def test_a_wrong_capacity_is_named(capacity):
    with pytest.raises(UserError, match="capacity=") as error:
        Route(capacity).kept(197)
    assert repr(capacity) in str(error.value)
    assert "\n" not in str(error.value)


def test_merge_and_prune_count_by_hand():
    assert Merge(13).merged(197, 1) == 13
    assert Merge(13).merged(12, 1) == 5  # half of 11 patches
    assert Prune(0.7).kept(197, 1) == 138  # 137.2
    assert Prune(0.55).kept(101, 1) == 55  # 0.55 * 100 is 55.00000000000001 in floating point


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Merge(-1), "r=-1"),
        (lambda: Merge(2.5), "r=2.5"),
        (lambda: Merge(True), "r=True"),
        (lambda: Prune(0), "keep=0"),
        (lambda: Prune(1.2), "keep=1.2"),
        (lambda: Route(0.5, activation="relu"), "activation='relu'"),
        (lambda: Route(0.5, activation="sigmoid"), "is of router=linear"),
        (lambda: Route(0.06, keep_prefix=True).kept(17, 1), "keep_prefix takes 1"),
    ],
)
def test_a_wrong_entry_is_named(make, words):
    with pytest.raises(UserError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


def test_placements():
    assert routed_blocks("alternate", 12) == (1, 3, 5, 7, 9, 11)
    assert routed_blocks("alternate", 7) == (1, 3, 5)
    assert routed_blocks("last8", 12) == (4, 6, 8, 10)
    assert routed_blocks("late", 12) == (6, 7, 8, 9, 10, 11)
    assert routed_blocks("few", 12) == (2, 5, 8)
    assert routed_blocks("few", 24) == (5, 11, 17)
    assert routed_blocks("few", 3) == (0, 1)
    assert routed_blocks([7, 1, 4], 12) == (1, 4, 7)
    assert routed_blocks([0, 1], 12) == (0, 1)


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        ("altrnate", "'altrnate'.*alternate, last8"),
        ([12], "12 is not one of 0 to 11"),
        ([-1], "-1 is not one of"),
        ([1, 1], "listed twice"),
        ([1.5], "1.5 is not one of"),
        ([True], "True is not one of"),
    ],
)
def test_wrong_placements_are_named(placement, words):
    with pytest.raises(UserError, match=words):
        routed_blocks(placement, 12)


def test_the_methods_as_plans():
    assert make_plan(4, "attention", 0.5) == {1: Route(0.5), 3: Route(0.5)}
    assert make_plan(4, "linear", 0.5, [2], activation="sigmoid") == {2: Route(0.5, "linear", activation="sigmoid")}
    assert make_plan(3, "tome", r=5) == {0: Merge(5), 1: Merge(5), 2: Merge(5)}
    assert make_plan(12, "evit", keep_rate=0.9, fuse=False) == dict.fromkeys((3, 6, 9), Prune(0.9, fuse=False))
    assert make_plan(12, "none", last="class") == {11: ClassOnly()}
    assert make_plan(4, "attention", 0.5, last="class") == {1: Route(0.5), 3: ClassOnly()}


def test_a_listed_block_is_not_the_class_tokens_alone_as_well():
    assert make_plan(4, "attention", 0.5, "late", last="class") == {2: Route(0.5), 3: ClassOnly()}
    for router, argument in (("attention", "placement"), ("tuning", "layers"), ("tome", "placement")):
        with pytest.raises(UserError, match=rf"{argument}=\[1,3\]: block 3 has the class token alone"):
            make_plan(4, router, placement=[3, 1], last="class")


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({12: Route()}, "12 is not one of 0 to 11"),
        ({-1: Route()}, "-1 is not one of"),
        ({1: "Route"}, "an entry is one of"),
        ({10: ClassOnly()}, "it stands in the last block, 11"),
        ({0: Route()}, "block 0 has no block before it"),
        ({1: Route(router="linear"), 2: Route(router="attention")}, "follows block 1"),
        ({1: Route(router="attention"), 2: Route(router="class_attention")}, "give both the same router"),
        ({1: Merge(3), 2: Merge(3, proportional=False)}, "proportional"),
    ],
)
def test_entries_that_cannot_stand_together_are_refused(plan, words):
    with pytest.raises(UserError, match=words):
        check_plan(plan, 12)


def test_a_block_whose_attention_saw_all_tokens_scores_them():
    check_plan({1: Route(router="linear", skip="mlp"), 2: Route(router="attention")}, 12)
    with pytest.raises(UserError, match="sees its kept tokens alone"):
        check_plan({1: Route(router="linear", skip="attention"), 2: Route(router="attention")}, 12)


def test_a_share_of_numpys_stands_for_what_it_prints():
    assert Route(np.float32(0.29)).kept(100) == 29
    assert Route(np.float16(0.7)).kept(10) == 7
    assert Prune(np.float32(0.1)).kept(11, 1) == 1


def test_a_field_that_is_missing_is_named():
    with pytest.raises(UserError, match=r"plan: block 1, Merge: has no r; write Merge: \{r: ...\}"):
        from_data({1: "Merge"})


def test_flags_are_true_or_false():
    for entry, field in ((Prune, "fuse"), (Route, "keep_prefix"), (Merge, "norm")):
        with pytest.raises(UserError, match=f"{field}='false': must be true or false"):
            entry(1, **{field: "false"})


MIXED = {1: Route(0.5, "linear"), 2: Merge(46), 3: Prune(0.7, fuse=False), 11: ClassOnly()}


def test_plans_go_through_yaml_and_pickle(tmp_path):
    assert pickle.loads(pickle.dumps(MIXED)) == MIXED
    assert from_data(as_data(MIXED)) == MIXED
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump({"plan": as_data(MIXED)}))
    assert read_plan(file) == MIXED
    file.write_text("1: {Route: {capacity: 0.5}}\n2: {Merge: {r: 46}}\n11: ClassOnly\n")
    assert read_plan(file) == {1: Route(0.5), 2: Merge(46), 11: ClassOnly()}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2]", "is no plan"),
        ("1: Rout", "write one of Route, Merge"),
        ("1: {Route: {capacty: 0.5}}", "its fields are capacity, router"),
        ("1: {Merge: {}}", "block 1, Merge"),
        ("1: {Merge: {r: many}}", "r='many'"),
        ("x: {Merge: {r: 3}}", "block 'x' is no whole number"),
        ("1.7: {Merge: {r: 3}}", "block 1.7 is no whole number"),
        ("true: {Merge: {r: 3}}", "block True is no whole number"),
        ("1: {Merge: {r: 3}}\n'1': {Merge: {r: 9}}", "block 1 stands there twice"),
        ("0: {Merge: {r: 3}}\n0: {Merge: {r: 9}}", "0 stands there twice"),
        ("1: {Merge: {r: 3, r: 4}}", "'r' stands there twice"),
        ("1: {Route: {capacity: 0.5, router: {a: 1}}}", "router={'a': 1}: must be a name"),
        ("1: {Gate: {skip: [mlp]}}", "must be a name"),
        ("1: {Route: ", "cannot be read as a plan"),
    ],
)
def test_a_wrong_plan_file_is_one_line(tmp_path, text, words):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        read_plan(tmp_path / "plan.yaml")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        read_plan(tmp_path / "none.yaml")


def test_numbers_of_numpys_become_pythons():
    plan = {1: Route(np.float64(0.5), memory=np.float32(0.25)), 2: Merge(np.int64(3)), 3: Prune(np.float32(0.5))}
    assert yaml.safe_load(yaml.safe_dump(as_data(plan))) == as_data(plan)
    assert [type(value) for value in (plan[1].capacity, plan[2].r, plan[3].keep)] == [float, int, float]
