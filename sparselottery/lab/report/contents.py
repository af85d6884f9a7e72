"""Which figures and sections the report has, in the order a reader wants them."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from ...ticket import Ticket
from . import draw, figures, page, tables, tickets
from .figures import Drawing, Picture, file_name
from .folder import TICKET, Run
from .tables import Row, grouped, spread

Rows = dict[str, list[Row]]
BITMAP_WEIGHTS = 2**18  # a mask with more is not shown
BITMAPS = 6
CURVED = (TICKET, "reinit")  # whose curves are shown


def ladder(rows: Rows) -> dict[int, float]:
    """The density of each round of the ticket."""
    return {row["round"]: row["density"] for row in rows["rounds"] if row["control"] == TICKET}


def chosen(rows: Rows) -> dict[int, float]:
    """Of a few rounds, the first and the last among them."""
    densities = ladder(rows)
    return {number: densities[number] for number in spread(densities)}


def drawings(rows: Rows) -> list[Drawing]:
    found: list[Drawing] = []

    def add(group: str, name: str, title: str, alt: str, figure: Figure | None) -> None:
        if figure is not None:
            found.append(Drawing(name, group, title, alt, draw.svg(figure, name), draw.png(figure)))

    rounds, few = rows["rounds"], chosen(rows)
    against = "against the share of weights left, for the ticket and each control"
    figure = figures.against_weights(rounds, "early_stop_test_accuracy", "test accuracy at early stop, %", 100)
    add("tickets", "accuracy", "Test accuracy at early stop", f"Test accuracy {against}", figure)
    figure = figures.against_weights(rounds, "early_stop_iteration", "iteration of early stop")
    add("tickets", "early-stop", "Early stop, in iterations", f"Iteration of early stop {against}", figure)
    for key in tables.own(rows["trainings"]):
        add("tickets", file_name("own", key), key, f"{key} {against}", figures.against_weights(rounds, key, key))
    if any(row["control"] == TICKET for row in rows["curves"]):
        limits = figures.accuracy_limits([row for row in rows["curves"] if row["control"] == TICKET])
        for control in CURVED:
            label = draw.style(control).label
            figure = figures.accuracy_curves(rows["curves"], few, control, limits)
            add("curves", f"curves-{control}", f"Training the {label}", f"Test accuracy of the {label}", figure)
    figure = figures.step_times(rounds)
    add("time", "step", "Time per training step", "Milliseconds per step: sparse, whole, w * mask", figure)
    figure = figures.seconds_saved(rows["seconds"])
    add("time", "seconds", "Seconds, added up over the rounds", "Seconds of all steps: sparse, whole, w * mask", figure)

    def add_layers(group: str, alt: str, make, only: list[Row]) -> None:
        by_layer = grouped(only, "layer")
        for name in figures.shown_layers(only):
            short = page.layer(name)
            add(group, file_name(group, short), short, f"{alt}, {short}", make(by_layer[name]))

    add_layers("distributions", "Initial values of all weights and of the survivors",
               lambda each: figures.distribution(each, few), rows["distributions"])  # fmt: skip
    add_layers("movement", "How far kept and pruned weights moved", figures.movement, rows["movement"])
    last = middle_round(few)
    degrees = [row for row in rows["degrees"] if row["round"] == last]
    add_layers("degrees", "Connections into and out of units", figures.degrees, degrees)
    add_layers("overlap", "Overlap of the masks of two trials and by chance", figures.overlap, rows["overlap"])
    figure = figures.connectivity(rows["connectivity"], few)
    add(
        "connectivity", "connectivity", "Test error on the line between two trainings", "Test error on the line", figure
    )
    figure = figures.instability(rows["connectivity"])
    add("connectivity", "instability", "Instability", "Instability against weights left", figure)
    return found


def middle_round(few: dict[int, float]) -> int:
    """The one whose masks are looked at: the last of a few with a tenth of the weights or more; else the first."""
    return max((number for number, density in few.items() if density >= 0.1), default=min(few))


def pictures(run: Run, rows: Rows) -> list[Picture]:
    """Connections per pixel in a few rounds, from the rows; and whole masks of one round, from its ticket."""
    found = []
    few = chosen(rows)
    first = rows["layers"][0]["layer"]
    shape = run.settings.get("shape")
    if isinstance(shape, list | tuple) and len(shape) == 1 and (side := math.isqrt(int(shape[0]))) ** 2 == shape[0]:
        counts = [row for row in rows["degrees"] if (row["layer"], row["side"]) == (first, "out_of")]
        for number, group in grouped(counts, "round").items():
            if number and len(group) == side * side:
                image = figures.pixels([row["connections"] for row in group], side)
                title = f"{draw.percent(few[number])} % left"
                found.append(Picture(f"pixels-round-{number:02d}", "pixels", title, image, side))
    number = middle_round(few)
    trial = next(iter(run.ladders))
    (path,) = (each.weights for each in run.trainings if each[:4] == (trial, TICKET, 0, number))
    masks = {name: mask for name, mask in Ticket.load(path).masks.items() if mask.numel() <= BITMAP_WEIGHTS}
    for name in [list(masks)[i] for i in spread(range(len(masks)), BITMAPS)]:
        mask = masks[name].flatten(1)
        title = f"{page.layer(name)}, {mask.shape[0]} {draw.TIMES} {mask.shape[1]}"
        image = figures.bitmap(mask.numpy())
        found.append(Picture(file_name("mask", page.layer(name)), "masks", title, image, mask.shape[1]))
    return found


def sections(run: Run, rows: Rows, drawn: list[Drawing], pictured: list[Picture]) -> list[str]:
    def of(group: str, kind: str = "figures") -> str:
        return page.drawings([each for each in drawn if each.group == group], kind)

    def shown(group: str, kind: str = "pictures") -> str:
        return page.pictures([each for each in pictured if each.group == group], kind)

    rounds, few = rows["rounds"], chosen(rows)
    controls = [name for name in run.controls if any(row["control"] == name for row in rounds)]
    trials = len({row["trial"] for row in rows["trainings"]})
    bands = "Lines are means over trials, bands go from the smallest to the largest. " if trials > 1 else ""
    looked = draw.percent(few[middle_round(few)])
    by_control = page.control_table(rounds, "early_stop_test_accuracy", 100, ".2f")
    by_stop = page.control_table(rounds, "early_stop_iteration", 1, ",.0f")
    partly = " A few layers are shown; all are in the CSV file." if len(grouped(rows["layers"], "layer")) > \
        figures.LAYERS_SHOWN else ""  # fmt: skip
    return [
        page.section(
            "Tickets and controls",
            f"{bands}Early stop is the iteration of minimum validation loss. The dotted line is the dense net.",
            page.key(controls),
            of("tickets"),
        ),
        page.section(
            "While training", "Test accuracy, mean over trials, by weights left; the dense net is dashed.", of("curves")
        ),
        page.section(
            "Time",
            "Time per step is measured alternately with the same net as w * mask. The whole net is round 0, on the "
            "same kernels. Speed-ups and savings are over the faster of the two. Seconds are steps times their time, "
            "without evaluation. Neither says anything about iterations.",
            of("time"),
        ),
        page.section(
            "Round by round",
            "Means over trials (of milliseconds, medians), and ranges where they differ. Seconds to early stop are its "
            "iterations times the measured time per step of that training; seconds to the end are measured.",
            page.round_table(rounds, tables.own(rows["trainings"])),
            page.details("Test accuracy at early stop of all controls, %", by_control) if controls else "",
            page.details("Iteration of early stop of all controls", by_stop) if controls else "",
        ),
        page.section(
            "Layers",
            "Weights left, %, of each layer after each round.",
            page.density_table(rows["layers"], ladder(rows)),
        ),
        page.section(
            "Input pixels", "Connections that each pixel keeps; each image has its own scale.", shown("pixels")
        ),
        page.section(
            "Masks",
            f"Whole masks with {looked} % of all weights left: a row for each output, black survives.",
            shown("masks", "bitmaps"),
        ),
        page.section(
            "Initial values of the survivors",
            f"Filled: all initial weights of the layer; lines: what survives, by weights left.{partly}",
            page.round_key({number: density for number, density in few.items() if number}, few),
            of("distributions", "panels"),
        ),
        page.section(
            "How far weights move",
            "Distance from the initial value after training: weights that the next pruning keeps, and those that it "
            f"takes; medians and quartiles.{partly}",
            of("movement", "panels"),
        ),
        page.section(
            "Connections per unit",
            f"With {looked} % of all weights left: connections into a layer's units and out of its inputs, over their "
            f"mean.{partly}",
            of("degrees", "panels"),
        ),
        page.section(
            "Do trials find the same ticket?",
            f"Jaccard index of the masks of two trials, mean over pairs, against masks drawn at random.{partly}",
            of("overlap", "panels"),
        ),
        page.section(
            "Linear mode connectivity",
            "The ticket trained twice, on data in another order: error on the straight line between the two, on "
            f"the first {tickets.TEST_IMAGES:,} test images. "
            "Instability is the largest error on it less the mean of its ends.",
            of("connectivity"),
        ),
    ]
