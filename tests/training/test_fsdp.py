"""Pulls, anchors and interpolation on parameters sharded by `fully_shard` equal those on whole parameters."""


def test_sharded_equals_whole(launch):
    found = {}
    for line in launch("shards.py").splitlines():
        if line.startswith("CASE "):
            _, case, worst = line.split()
            found[case] = float(worst)
    forms = [(kind, weighing) for kind in ("full", "lora", "moved-lora") for weighing in ("l2sp", "ewc")]
    expected = {f"{kind}/{weighing}/{action}" for kind, weighing in forms for action in ("gradient", "proximal")}
    expected |= {f"{kind}/{weighing}/interpolate" for kind, weighing in forms if kind != "moved-lora"}
    expected |= {f"full/{weighing}/value" for weighing in ("l2sp", "ewc")} | {"snapshot", "sharded-anchor"}
    assert set(found) == expected
    assert all(worst < 1e-6 for worst in found.values()), found
