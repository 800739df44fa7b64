"""The tables of the experiments' READMEs, from their committed results.

python experiments/tables.py 05-drafters 06-shapes

A README holds them between `<!-- table NAME -->` and `<!-- end of table -->`.
"""

import re
from collections.abc import Callable
from typing import Annotated, Any

import prediction
import typer
from results import (
    HERE,
    Arms,
    arms_of,
    brief,
    cells_of,
    figure,
    groups_of,
    read,
    strategies,
    table,
)

from specdec.common.config import read_model
from specdec.engines.admit import Admission
from specdec.report.tables import Column

DOMAINS = ("gsm8k", "sgd", "taskmaster4")
SIZES = ("1 layer", "4 layers", "8 layers")
# What papers and programs take whatever the hardware, and the shape here that is nearest.
CONSTANTS = {
    "draft chain of 5": ("draft model 5", "draft model"),
    "EAGLE-1: 25 nodes, 5 levels": ("eagle 5-8-25", "eagle "),
    "EAGLE-2 and EAGLE-3: 59 nodes, 6 levels": ("eagle3 6-10-59", "eagle3"),
    "EAGLE-2 and EAGLE-3: 59 nodes, 8 levels": ("eagle3 8-10-59", "eagle3"),
    "Medusa: 63 nodes": ("medusa 63", "medusa"),
}


# How the arms are called in the README of the repository, and of 01.
WORDS = {
    "hf_generate": "transformers `generate`",
    "hf_assisted": "transformers assisted, 4 tokens",
    "draft model": "draft model, 4 tokens",
    "medusa": "Medusa, computed tree",
    "eagle tree": "EAGLE-1, tree",
    "eagle chain": "EAGLE-1, chain",
    "eagle3 tree": "EAGLE-3, tree",
    "eagle3 chain": "EAGLE-3, chain",
    "hybrid tree": "hybrid: suffix and EAGLE-3 tree",
    "hybrid chain": "hybrid: suffix and EAGLE-3 chain",
}
SPEEDS = ("tau", "speedup_vs_plain", "end_to_end_speedup_vs_plain", "speedup_vs_hf")
HEAD = ["arm", "tau", "vs plain", "with prefill", "vs transformers `generate`"]
OTHER_MS = Column("other_ms_per_step", "", 2).cell
EFFICIENCY = Column("loop_efficiency", "", 3).cell
ACCEPTED = Column("acceptance_rate", "", 0, "%", scale=100).cell
# Drafters of 03-domain, and their arms in its benches.
TRAINED = {
    "draft model, generic": "draft generic",
    "draft model, QLoRA on gsm8k": "draft for gsm8k",
    "draft model, QLoRA on sgd": "draft for sgd",
    "EAGLE-3, generic": "eagle3 generic",
    "EAGLE-3, trained on for gsm8k": "eagle3 for gsm8k",
    "EAGLE-3, trained on for sgd": "eagle3 for sgd",
}

# Experiment 16.
SEEDS = (0, 1, 2)
OFFLINE = ("tau", "alpha at T = 0", "alpha at T = 1")
MIXTURES = ("mixture", "mixture, no layer attention", "mixture, no cross-attention")
TREES = {
    "eagle3": "EAGLE-2's, of EAGLE-3",
    "marginal": "marginal, of DFlash",
    "conditional": "conditional, of DSpark",
    "medusa": "marginal, of Medusa",
}


def measured() -> dict[str, str]:
    """The README of the repository."""
    arms = arms_of(read("02-heads/t0/results.json"))
    rows = [[WORDS.get(name, name), *_figures(arm)] for name, arm in arms.items()]
    return {"measured": table(HEAD, rows)}


def _figures(arm: Any) -> list[str]:
    return [figure(arm, key) for key in SPEEDS]


def core() -> dict[str, str]:
    """Experiment 01: one prompt at a time, and eight."""
    one, eight = (arms_of(read(f"01-core/batch{size}/results.json")) for size in (1, 8))
    rows = [
        [
            WORDS.get(name, name),
            *_figures(arm),
            *(cell(arm) for cell in (OTHER_MS, EFFICIENCY)),
        ]
        for name, arm in one.items()
    ]
    head = ["arm", "tau", "tokens/s, decoding", "/ at batch 1", "tokens/s, whole call"]
    return {
        "batch1": table([*HEAD, "in neither model, ms", "loop efficiency"], rows),
        "batch8": table(
            [*head, "/ at batch 1", "loop efficiency"],
            [
                [
                    WORDS.get(name, name),
                    figure(arm, "tau"),
                    *_throughput(arm, one[name], "batch_decode_tokens_per_s"),
                    *_throughput(arm, one[name], "batch_tokens_per_s"),
                    EFFICIENCY(arm),
                ]
                for name, arm in eight.items()
            ],
        ),
    }


def _throughput(arm: Any, alone: Any, key: str) -> list[str]:
    ours, theirs = (getattr(each, key) for each in (arm, alone))
    return [f"{ours:.0f}", f"{ours / theirs:.2f}"]


def heads() -> dict[str, str]:
    """Experiment 02: trees to choose from, then the chosen ones at both temperatures."""
    found = {name: arms_of(read(f"02-heads/{name}/results.json")) for name in ("tune", "t0", "t1")}
    tables = {
        name: table(
            [*HEAD, "accepted / drafted", "loop efficiency"],
            [
                [
                    each,
                    *_figures(arm),
                    ACCEPTED(arm) if arm.acceptance_rate else "-",
                    EFFICIENCY(arm),
                ]
                for each, arm in found[name].items()
            ],
        )
        for name in ("t0", "t1")
    }
    rows = [[name, *_figures(arm)[:2]] for name, arm in found["tune"].items()]
    return {"tune": table(["arm", "tau", "vs plain"], rows), **tables}


def domain() -> dict[str, str]:
    """Experiment 03, what its own tables.py does not print: speeds."""
    rows = [[name] for name in TRAINED]
    for domain in DOMAINS[:2]:
        arms = arms_of(read(f"03-domain/bench-{domain}/results.json"))
        for row, name in zip(rows, TRAINED.values(), strict=True):
            row += [figure(arms[name], key) for key in ("tau", "speedup_vs_plain")]
    heads = [f"{domain}: {what}" for domain in DOMAINS[:2] for what in ("tau", "speed")]
    return {"speeds": table(["drafter", *heads], rows)}


def recipes() -> dict[str, str]:
    """Experiment 04: a draft model before and after."""
    arms = arms_of(read("04-recipes/bench-qlora/results.json"))
    rows = [[name, *_figures(arms[name])[:3]] for name in ("before", "after")]
    return {"qlora": table(["draft model", *HEAD[1:4]], rows)}


def drafters() -> dict[str, str]:
    """Experiment 05: a table a temperature."""
    head = ["arm", "tau", "vs plain", "vs `generate`", *(f"{each}: vs plain" for each in DOMAINS)]
    return {
        f"T={temperature:g}": table(head, [_drafter_row(arm) for arm in arms.values()])
        for temperature, arms in cells_of(
            read("05-drafters/sweep.json"), "sampling.temperature"
        ).items()
    }


def _drafter_row(arm: Any) -> list[str]:
    keys = ("tau", "speedup_vs_plain", "speedup_vs_hf")
    speeds = (figure(arm.domains[domain], "speedup_vs_plain") for domain in DOMAINS)
    return [arm.name, *(figure(arm, key) for key in keys), *speeds]


def shapes() -> dict[str, str]:
    """Experiment 06: chains by length, trees by depth and nodes, and the constants."""
    arms = arms_of(read("06-shapes/results.json"))
    return {
        "chains": table(["drafter", "tokens", "tau", "vs plain"], _chain_rows(arms)),
        "trees": _tree_table(arms),
        "medusa": table(
            ["nodes", "tau", "vs plain"],
            [
                [name.split()[1], figure(arm, "tau"), figure(arm, "speedup_vs_plain")]
                for name, arm in arms.items()
                if name.startswith("medusa")
            ],
        ),
        "constants": table(
            ["constant", "tau", "vs plain", "best of this drafter here", "tau", "vs plain"],
            [_constant_row(arms, *row) for row in CONSTANTS.items()],
        ),
    }


def _chain_rows(arms: Arms) -> list[list[str]]:
    chains = [name for name in arms if name.startswith("draft model") or " chain " in name]
    return [
        [*name.rsplit(" ", 1), figure(arms[name], "tau"), figure(arms[name], "speedup_vs_plain")]
        for name in chains
    ]


def _tree_table(arms: Arms) -> str:
    trees = {}
    for name, arm in arms.items():
        if shape := re.fullmatch(r"eagle3 (\d+)-(\d+)-(\d+)", name):
            trees[int(shape[1]), int(shape[3])] = arm
    depths, sizes = (sorted({shape[axis] for shape in trees}) for axis in (0, 1))
    rows = [
        [str(depth), *(brief(trees[depth, n]) if (depth, n) in trees else "-" for n in sizes)]
        for depth in depths
    ]
    return table(["levels", *(f"{n} nodes" for n in sizes)], rows)


def _constant_row(arms: Arms, constant: str, names: tuple[str, str]) -> list[str]:
    name, family = names
    best = max(
        (each for each in arms if each.startswith(family)), key=lambda n: arms[n].speedup_vs_plain
    )
    keys = ("tau", "speedup_vs_plain")
    theirs, ours = ([figure(arms[each], key) for key in keys] for each in (name, best))
    return [constant, *theirs, best, *ours]


def draft_size() -> dict[str, str]:
    """Experiment 07: each size at its fastest length, all lengths, and the training."""
    arms = arms_of(read("07-draft-size/results.json"))
    training = read("07-draft-size/training.json")
    lengths = sorted({int(name.split(", ")[1]) for name in arms if ", " in name})
    fastest = [
        max((arms[f"{size}, {n}"] for n in lengths), key=lambda arm: arm.speedup_vs_plain)
        for size in SIZES
    ]
    rows = [
        [
            size,
            f"{training[size]['parameters']:,}",
            f"{100 * arms[f'{size}, 1'].per_depth[0]:.1f} %",
            arm.name.split(", ")[1],
            figure(arm, "tau"),
            figure(arm, "speedup_vs_plain"),
            f"{100 * arm.time_s.draft / arm.time_s.wall:.0f} %",
        ]
        for size, arm in zip(SIZES, fastest, strict=True)
    ]
    head = ["draft model", "parameters", "first token accepted", "fastest length", "tau"]
    by_length = [[size, *(brief(arms[f"{size}, {n}"]) for n in lengths)] for size in SIZES]
    trained = [
        [
            size,
            *(f"{run[key]:,.0f}" for key in ("steps", "tokens", "seconds")),
            *(f"{run[key]:.2f}" for key in ("loss", "validation_loss")),
        ]
        for size, run in training.items()
    ]
    return {
        "sizes": table([*head, "vs plain", "of the time drafting"], rows),
        "lengths": table(["draft model", *(f"length {n}" for n in lengths)], by_length),
        "training": table(
            ["draft model", "steps", "tokens", "seconds", "loss", "held-out loss"], trained
        ),
    }


def sampling() -> dict[str, str]:
    """Experiment 08: arms against temperature, and against top-p."""
    by_temperature = cells_of(read("08-sampling/temperature.json"), "sampling.temperature")
    by_top_p = cells_of(read("08-sampling/top-p.json"), "sampling.top_p")
    return {
        "temperature": _by_setting("T", by_temperature),
        "top-p": _by_setting("top-p", {**by_top_p, 1: by_temperature[1]}),
    }


def _by_setting(name: str, cells: dict[Any, Arms]) -> str:
    arms = strategies(next(iter(cells.values())))
    rows = [[arm, *(brief(found[arm]) for found in cells.values())] for arm in arms]
    return table(["arm", *(f"{name} = {value:g}" for value in cells)], rows)


def rules() -> dict[str, str]:
    """Experiment 09: rules on chains and on trees."""
    return {
        kind: _rule_table(cells_of(read(f"09-rules/{kind}.json"), "sampling.temperature", "rule"))
        for kind in ("chains", "trees")
    }


def _rule_table(cells: dict[Any, Arms]) -> str:
    rows = []
    for arm in strategies(next(iter(cells.values()))):
        for (temperature, rule), arms in cells.items():
            keys = ("tau", "speedup_vs_plain")
            shown = (figure(arms[arm], key) for key in keys)
            rows.append([arm, f"{temperature:g}", rule, *shown, f"{_judging_ms(arms[arm]):.2f}"])
    return table(["draft", "T", "rule", "tau", "vs plain", "verify, ms a step"], rows)


def _judging_ms(arm: Any) -> float:
    steps = sum(each.steps for each in arm.per_prompt if each)
    return 1000 * arm.time_s.verify / (steps or 1)


def batch() -> dict[str, str]:
    """Experiment 10: fixed lengths over batch sizes, the schedule, and what follows it."""
    fixed = cells_of(read("10-batch/fixed.json"), "batch_size")
    names = strategies(fixed[1])
    plain = [
        "plain, tokens/s",
        *(f"{arms['plain'].batch_decode_tokens_per_s:.0f}" for arms in fixed.values()),
    ]
    head = ["arm", *(f"batch {size}" for size in fixed)]
    rows = [[name, *(brief(arms[name]) for arms in fixed.values())] for name in names]
    schedule = {str(size): n for size, n in read("10-batch/plan.json").schedule.items()}
    found = {"fixed": table(head, [plain, *rows])}
    found["schedule"] = table(
        ["batch", *schedule], [["drafted tokens", *(str(n) for n in schedule.values())]]
    )
    for kind in ("held-out", "hostile"):
        cells = cells_of(read(f"10-batch/{kind}.json"), "batch_size")
        found[kind] = table(
            ["arm", *(f"batch {size}" for size in cells)],
            [
                [name, *(figure(arms[name], "speedup_vs_plain") for arms in cells.values())]
                for name in ("always", "schedule", "controller")
            ],
        )
    head = ["batch", "arm", "ms a token in steps", "waiting", "a row waits in all, median ms"]
    found["waiting"] = table(head, _waiting_rows())
    users = groups_of("10-batch/users.json")
    found["users"] = table(
        ["arm", *(f"{group}, {what}" for group in users for what in ("a user", "all"))],
        [
            [name, *(text for arms in users.values() for text in _user_speeds(arms[name].load))]
            for name in ("always", "controller")
        ],
    )
    return found


def _waiting_rows() -> list[list[str]]:
    keys = ("in_steps_ms_per_token", "waiting_ms_per_token", "waiting_ms_median")
    sizes = read("10-batch/waiting.json")["batch"]
    return [
        [size, name, *(f"{row[key]:.2f}" for key in keys)]
        for size, arms in sizes.items()
        for name, row in arms.items()
    ]


def _user_speeds(load: Any) -> list[str]:
    low, high = load.tokens_per_s_vs_plain_range
    every = f"{load.tokens_per_s_vs_plain:.2f} ({low:.2f} to {high:.2f})"
    return [figure(load, "user_speed_vs_plain"), every]


def predicted() -> dict[str, str]:
    """Experiment 11: every configuration, and how well the plan did as a whole."""
    found = {kind: prediction.pairs(kind) for kind in ("same", "fresh")}
    fresh = {each.planned.name: each for each in found["fresh"]}
    rows = [
        [
            each.planned.name,
            f"{each.planned.predicted_tau:.2f}",
            f"{each.arm.tau:.2f}",
            figure(each.planned, "predicted_speedup"),
            figure(each.arm, "speedup_vs_plain"),
            f"{100 * each.error:+.1f} %",
            f"{100 * fresh[each.planned.name].error:+.1f} %",
        ]
        for each in found["same"]
    ]
    head = ["configuration", "tau planned", "measured", "vs plain planned", "measured", "error"]
    totals = {kind: prediction.summary(each) for kind, each in found.items()}
    return {
        "configurations": table([*head, "fresh prompts"], rows),
        "summary": table(["over all configurations", "same prompts", "fresh"], _totals(totals)),
        "earlier": table(
            ["finalists", "choice", "median error", "rank correlation", "behind the best"],
            [_earlier_row(each) for each in read("11-prediction/earlier.json")],
        ),
    }


def _earlier_row(planner: dict[str, Any]) -> list[str]:
    forms = {"median_error": "{:.1%}", "rank_correlation": "{:.3f}", "choice_behind_best": "{:.1%}"}
    shown = (form.format(planner[key]) for key, form in forms.items())
    return [planner["finalists"], planner["choice"], *shown]


def _totals(totals: dict[str, dict[str, float]]) -> list[list[str]]:
    shown = {
        "configurations": ("configurations", "{:.0f}"),
        "median error of the speed": ("median_error", "{:.1%}"),
        "rank correlation (Spearman)": ("rank_correlation", "{:.3f}"),
        "measured speeds inside the planned interval": ("covered", "{:.0%}"),
        "the plan's choice is slower than the fastest by": ("choice_behind_best", "{:.1%}"),
    }
    return [
        [name, *(form.format(totals[kind][key]) for kind in ("same", "fresh"))]
        for name, (key, form) in shown.items()
    ]


def serving() -> dict[str, str]:
    """Experiment 12: each suite's groups side by side, and what users at the same time get."""
    shown = ("single-turn", "long-context")
    found = {name: _by_group(groups_of(f"12-serving/{name}.json")) for name in shown}
    turns = groups_of("12-serving/multi-turn.json")
    some = {name: turns[name] for name in list(turns)[:: max(1, len(turns) // 5)]}
    found["multi-turn"] = _by_group(some)
    found["latency"] = table(
        ["seconds to the whole answer, median", *some],
        [
            [name, *(f"{arms[name].latency_s['p50']:.2f}" for arms in some.values())]
            for name in next(iter(some.values()))
        ],
    )
    users = groups_of("12-serving/concurrent.json")
    head = ["users", "arm", "tokens/s of all", "a user's speed vs plain"]
    head += ["first token p50, p95", "gap between chunks p50, p95, p99", "Jain"]
    rows = [[size, *_load_row(arm)] for size, arms in users.items() for arm in arms.values()]
    found["concurrent"] = table(head, rows)
    return found


def _by_group(groups: dict[str, Arms]) -> str:
    names = [name for name in next(iter(groups.values())) if name != "plain"]
    plain = (f"{arms['plain'].decode_tokens_per_s:.0f}" for arms in groups.values())
    rows = [[name, *(brief(arms[name]) for arms in groups.values())] for name in names]
    return table(["arm", *groups], [["plain, tokens/s", *plain], *rows])


def _load_row(arm: Any) -> list[str]:
    load = arm.load
    waits = [
        ", ".join(f"{1000 * value:.0f}" for value in list(getattr(arm, key).values())[:count])
        + " ms"
        for key, count in (("ttft_s", 2), ("chunk_gap_s", 3))
    ]
    speeds = [f"{load.tokens_per_s:.0f}", figure(load, "user_speed_vs_plain")]
    return [arm.name, *speeds, *waits, f"{load.jain_index:.2f}"]


def scaling() -> dict[str, str]:
    """Experiment 13: exponents of growth, and the verifier where there is most to verify."""
    found = read("13-scaling/scaling.json")
    parts = ("target", "draft", "verify", "rest")
    rows = [
        [each["size"], each["mode"], *(f"{each[part]:.2f}" for part in parts)]
        for each in found["slopes"]
    ]
    large = found["large"]
    times = [
        [part, f"{ms:.2f}", f"{ms / large['ms']['target forward']:.2%}"]
        for part, ms in large["ms"].items()
    ]
    shares = [
        [kind, f"{large['step_ms'][kind]:.0f}", f"{large['verify_share'][kind]:.2%}"]
        for kind in ("greedy", "sampled")
    ]
    return {
        "slopes": table(["size", "mode", *parts], rows),
        "large": table(["part", "median, ms", "of the target's forward"], times),
        "share": table(["step", "ms", "the verifier's share"], shares),
    }


def compiled() -> dict[str, str]:
    """Experiment 14: the goals, all arms at both batch sizes, and starts in fresh processes."""
    found = read("14-compiled/results.json")
    speeds = ("vs_plain_eager", "whole_vs_plain_eager")
    head = ["arm", "tokens/s, decoding", "vs plain eager", "with prefill", "tau"]
    head += ["in neither model, ms", "loop efficiency", "other texts"]
    groups = {"batch1": (found, 1), "batch8": (found, 8)}
    groups["eager"] = read("14-compiled/eager.json"), 1  # a later run, of the eager loop alone
    by_batch = {
        name: table(
            head,
            [
                [
                    arm["name"],
                    f"{arm['tokens_per_s']:.0f}",
                    *(figure(arm, key) for key in (*speeds, "tau")),
                    *(cell(arm) for cell in (OTHER_MS, EFFICIENCY)),
                    f"{arm['mismatches']} of {arm['answers']}",
                ]
                for arm in run["arms"]
                if arm["batch"] == size
            ],
        )
        for name, (run, size) in groups.items()
    }
    keys = ("load_s", "first_pass_s", "second_pass_s", "start_s", "compile_s")
    starts = [
        [
            name,
            *(f"{start[key]:.1f}" for key in keys),
            *(f"{start[key] / 1e6:.0f}" for key in ("peak_bytes", "decoding_peak_bytes")),
        ]
        for name, start in found["starts"].items()
    ]
    words = ["start", "loading, s", "first pass", "second pass", "start", "of it compiling"]
    return {
        "goals": table(["goal", "at least", "at most", "found", "met"], _goal_rows(found["goals"])),
        **by_batch,
        "starts": table([*words, "peak, MB", "of the second pass"], starts),
    }


def _goal_rows(goals: list[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for goal in goals:
        least, most, value = (goal.get(key) for key in ("least", "most", "value"))
        is_known = value is not None and (least, most) != (None, None)
        is_met = is_known and (least is None or value >= least) and (most is None or value <= most)
        what = goal["what"]
        if goal.get("under") and not what.endswith("compiled / eager"):
            what = f"{what} (`{goal['under']}`)"
        shown = [each if each is None else f"{each:g}" for each in (least, most)]
        rows.append(
            [
                what,
                *(each or "-" for each in shown),
                figure(goal, "value"),
                ("yes" if is_met else "no") if is_known else "-",
            ]
        )
    return rows


def engines() -> dict[str, str]:
    """Write each engine's arms: accepted length, speeds, and time to the first token."""
    head = ["arm", "tau", "tokens/s", "vs fastest plain", "vs its own plain", "first token p50"]
    rows = [
        [
            arm.name,
            figure(arm, "tau"),
            f"{arm.decode_tokens_per_s:.0f}",
            figure(arm, "speedup_vs_plain"),
            figure(arm, "speedup_vs_engine_plain"),
            f"{1000 * arm.ttft_s['p50']:.0f} ms",
        ]
        for arm in read("15-engines/bake-off.json").arms
    ]
    counted = ["drafts", "drafted", "accepted", "at position 1, 2, ...", "texts"]
    admitted = []
    for file in sorted((HERE / "15-engines/admitted").glob("*.json")):
        found = read_model(Admission, file)
        assert found.is_equal, file
        theirs, num = found.theirs or found.ours, found.num_prompts
        counts = [theirs[what] for what in ("drafts", "drafted", "accepted")]
        places = " ".join(str(n) for what, n in theirs.items() if what.startswith("accepted at"))
        texts = f"{found.equal_texts['drafter']} of {num} equal"
        name = file.stem.removeprefix(f"{found.engine}-")
        engine = f"{found.engine} {found.version}"
        admitted.append([name, engine, *map(str, counts), places, texts])
    return {
        "engines": table(head, rows),
        "admitted": table(["drafter", "engine", *counted], admitted),
    }


def new_heads() -> dict[str, str]:
    """Write each head's offline figures, chains and trees over seeds, the goals, and the losses."""
    heads = [
        [
            row["head"],
            f"{row['parameters'] / 1000:.0f}",
            *(_over_seeds(row[key]) for key in (*OFFLINE, "cpu_minutes")),
            _by_depth(row["acceptance"]),
        ]
        for row in read("16-drafters/heads.json")["summary"]
    ]
    losses = [
        [
            row["head"],
            row["loss"],
            *(_over_seeds(row[key]) for key in ("tau", *(f"{key}, change" for key in OFFLINE))),
            _by_depth(row["acceptance"]),
        ]
        for row in read("16-drafters/losses.json")["summary"]
    ]
    seeds = [cells_of(read(f"16-drafters/chains-{n}.json"), "sampling.temperature") for n in SEEDS]
    others = [
        cells_of(read(f"16-drafters/chains-{name}.json"), "sampling.temperature")
        for name in ("compiled", "spec")
    ]
    trees = [arms_of(read(f"16-drafters/trees-{n}.json")) for n in SEEDS]
    chains, domains = [], []
    for name in strategies(seeds[0][0]):
        row = [name]
        for temperature in (0, 1):
            row.append(_spread([cells[temperature][name].tau for cells in seeds]))
            some = (seeds[0], others[0])
            row += [figure(cells[temperature][name], "speedup_vs_plain") for cells in some]
        chains.append(row)
        by_domain = [cells[0][name].domains for cells in seeds]
        known = [_spread([of[domain].tau for of in by_domain]) for domain in DOMAINS]
        domains.append([name, *known, *(figure(others[1][t][name], "tau") for t in (0, 1))])
    by_nodes = [
        [
            str(nodes),
            *(
                f"{_spread([arms[name].tau for arms in trees])}; {speed}"
                for name in (f"{kind} {nodes}" for kind in TREES)
                for speed in [figure(trees[0][name], "speedup_vs_plain")]
            ),
        ]
        for nodes in (8, 16, 32, 60)
    ]
    each = ["vs plain", "compiled"]
    offline = ["tau", "alpha, T = 0", "alpha, T = 1"]
    words = ["gsm8k", "sgd", "taskmaster4", "Spec-Bench", "Spec-Bench, T = 1"]
    changes = ["tau", "change", "alpha, T = 0: change", "T = 1: change", "by depth"]
    return {
        "goals": table(["goal", "at least", "at most", "found", "met"], _goal_rows(_goals())),
        "heads": table(["head", "1000 weights", *offline, "CPU, min", "by depth"], heads),
        "chains": table(["arm", "tau, T = 0", *each, "tau, T = 1", *each], chains),
        "domains": table(["arm", *words], domains),
        "trees": table(["nodes", *TREES.values()], by_nodes),
        "losses": table(["head", "loss", *changes], losses),
    }


def _goals() -> list[dict[str, Any]]:
    """Give what was asked of the heads, over seeds where a figure is one of seeds."""
    seeds = [cells_of(read(f"16-drafters/chains-{n}.json"), "sampling.temperature") for n in SEEDS]
    trees = [arms_of(read(f"16-drafters/trees-{n}.json")) for n in SEEDS]
    compiled = cells_of(read("16-drafters/chains-compiled.json"), "sampling.temperature")[0]
    found = {row["head"]: row for row in read("16-drafters/heads.json")["summary"]}

    def ratio(what: str, least: float | None, pairs: list[tuple[float, float]]) -> dict[str, Any]:
        shares = [one / other for one, other in pairs]
        ends = (min(shares), max(shares)) if len(shares) > 1 else None
        value = sum(shares) / len(shares)
        return {"what": what, "least": least, "value": value, "value_ci": ends}

    def tau(cells: dict[Any, Arms], name: str, temperature: int = 0) -> float:
        return float(cells[temperature][name].tau)

    def speed(name: str) -> float:
        return float(compiled[name].speedup_vs_plain)

    independent = ("dflash", "dflash drawn")
    block = max(("dflash", "dspark", "jetspec"), key=speed)
    eagle3 = [row for row in read("16-drafters/losses.json")["summary"] if row["head"] == "eagle3"]
    new = max(eagle3, key=lambda row: row["tau"]["value"])
    base = next(row for row in eagle3 if row["loss"] == "cross_entropy")
    mixture = [found[name]["tau"]["value"] for name in MIXTURES]
    return [
        ratio(
            "DFlash's chain over EAGLE-3's, tau at T = 0",
            0.9,
            [(tau(cells, "dflash"), tau(cells, "eagle3")) for cells in seeds],
        ),
        ratio(
            "DSpark drawn over DFlash in its better mode, tau at T = 1",
            1.1,
            [
                (tau(cells, "dspark drawn", 1), max(tau(cells, name, 1) for name in independent))
                for cells in seeds
            ],
        ),
        ratio(
            "conditional over marginal tree of 16 nodes, tau at T = 0",
            1.05,
            [(arms["conditional 16"].tau, arms["marginal 16"].tau) for arms in trees],
        ),
        ratio(
            f"fastest chain of a block head ({block}) over EAGLE-3's, speed at T = 0, compiled",
            1.05,
            [(speed(block), speed("eagle3"))],
        ),
        ratio(
            f"best loss for EAGLE-3 ({new['loss']}) over cross-entropy, offline tau",
            1.04,
            [(new["tau"]["value"], base["tau"]["value"])],
        ),
        *(
            ratio(f"Mixture of Attentions over itself {name}, offline tau", None, [pair])
            for name, pair in zip(
                ("without layer self-attention", "without cross-attention"),
                ((mixture[0], other) for other in mixture[1:]),
                strict=True,
            )
        ),
    ]


def _by_depth(shares: list[float | None]) -> str:
    return " ".join("-" if share is None else f"{share:.2f}" for share in shares)


def _spread(values: list[float]) -> str:
    """Write the mean over seeds, and the lowest and highest seed."""
    return f"{sum(values) / len(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def _over_seeds(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    digits = 3 if abs(found["value"]) < 1 else 2
    value, *ends = (f"{each:.{digits}f}" for each in (found["value"], *(found["ci"] or ())))
    return f"{value} [{', '.join(ends)}]" if ends else value


# By the folder of the README; that of the repository is "..".
TABLES: dict[str, Callable[[], dict[str, str]]] = {
    "..": measured,
    "01-core": core,
    "02-heads": heads,
    "03-domain": domain,
    "04-recipes": recipes,
    "05-drafters": drafters,
    "06-shapes": shapes,
    "07-draft-size": draft_size,
    "08-sampling": sampling,
    "09-rules": rules,
    "10-batch": batch,
    "11-prediction": predicted,
    "12-serving": serving,
    "13-scaling": scaling,
    "14-compiled": compiled,
    "15-engines": engines,
    "16-drafters": new_heads,
}


def filled(readme: str, tables: dict[str, str]) -> str:
    """The text of a README with every table between its marks made anew.

    Raises:
        KeyError: the README names a table that there is not.
    """
    return re.sub(
        r"<!-- table (\S+) -->\n.*?<!-- end of table -->",
        lambda mark: f"<!-- table {mark[1]} -->\n{tables[mark[1]]}\n<!-- end of table -->",
        readme,
        flags=re.S,
    )


def main(
    names: Annotated[list[str] | None, typer.Argument(help="folders; all if none")] = None,
) -> None:
    for name in names or TABLES:
        path = HERE / name / "README.md"
        path.write_text(filled(path.read_text(), TABLES[name]()))
        print(path)


if __name__ == "__main__":
    typer.run(main)
