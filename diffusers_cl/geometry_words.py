"""What the numbers of a geometry say, in plain words: every sentence is chosen by what was measured, none is fixed."""

import numpy as np

from .bands import ALL, BANDS
from .geometry_plots import BAND_NAMES, PUBLISHED_RATIO, PUBLISHED_RATIO_AT
from .movement import rises
from .plots import format_number


# What the words mean: a cosine that is called collinear, a ratio of eigenvalues one order of magnitude wide, a relative error
# below which an approximation is called close, and a factor that is called more.
COLLINEAR, DOMINANT, CLOSE, MORE = 0.9, 0.1, 0.3, 2.0
# The move at which directions are compared.
COMPARED_STEP = 0.1


def _at(rows: list[dict], chosen: list[dict]) -> str:
    """Timesteps in words."""
    if not chosen:
        return "at no timestep"
    if len(chosen) == len(rows):
        return "at every timestep"
    return "at t = " + ", ".join(str(row["t"]) for row in chosen)


def _holds(rows: list[dict], chosen: list[dict]) -> str:
    if len(chosen) == len(rows):
        return "**Holds here.**"
    return "**Does not hold here.**" if not chosen else "**Holds here only in part.**"


def _range(rows: list[dict], name: str) -> str:
    """A value over timesteps: the lowest and the highest, each with its t."""
    low, high = min(rows, key=lambda row: row[name]), max(rows, key=lambda row: row[name])
    return f"{format_number(low[name])} (t = {low['t']}) to {format_number(high[name])} (t = {high['t']})"


def scaled_prediction(rows: list[dict]) -> str:
    """Figure 1: at low SNR the network predicts its scaled input."""
    first, last = rows[0], rows[-1]
    if len(rows) == 1:
        return f"The error is {format_number(first['scaled_prediction_error'])} at t = {first['t']}; one timestep shows no trend."
    values = [row["scaled_prediction_error"] for row in rows]
    falls = values[-1] < values[0]
    steady = all(b <= a for a, b in zip(values, values[1:], strict=False))
    said = "falls at every step" if falls and steady else "falls, with exceptions," if falls else "does not fall"
    text = (
        f"The claim: with more noise the network predicts its scaled input. The error {said}, from"
        f" {format_number(values[0])} at t = {first['t']} to {format_number(values[-1])} at t = {last['t']}"
    )
    return f"{text}. {'**Holds here.**' if falls and values[-1] < 0.1 * values[0] else '**Does not hold here.**'}"


def cosines(rows: list[dict]) -> str:
    """Figure 2: per-sample gradients are collinear with their mean."""
    means = {row["t"]: np.mean(row["cosines"]) for row in rows}
    chosen = [row for row in rows if means[row["t"]] >= COLLINEAR]
    low, high = min(means, key=means.get), max(means, key=means.get)
    n = len(rows[0]["cosines"])
    return (
        f"The claim: per-sample gradients are mostly collinear with their mean, more so at mid and late timesteps. The mean |cos| is"
        f" between {means[low]:.2f} (t = {low}) and {means[high]:.2f} (t = {high}); {n} gradients with nothing in common would have"
        f" about {n**-0.5:.2f}, each for its own part in the mean. It is {COLLINEAR} or more {_at(rows, chosen)}."
        f" {_holds(rows, chosen)}"
    )


def mean_cosines(timesteps: dict) -> str:
    """Figure 3a: mean gradients of different timesteps align."""
    size = len(timesteps["rows"])
    if size < 2:
        return "One timestep has nothing to be compared with."
    pairs = [(timesteps["mean_cosines"][i][j], i, j) for i in range(size) for j in range(i)]
    fair = [timesteps["corrected_mean_cosines"][i][j] for i in range(size) for j in range(i)]
    known = [value for value in fair if value is not None]
    low, i, j = min(pairs)
    t = [row["t"] for row in timesteps["rows"]]
    next_to = np.mean([timesteps["mean_cosines"][i][i + 1] for i in range(size - 1)])
    text = (
        f"The claim: mean gradients of all timesteps point the same way, so that averaging over t loses nothing. Different"
        f" timesteps have {np.mean([pair[0] for pair in pairs]):.2f} on average (neighbours {next_to:.2f}), and {low:.2f} at the"
        f" least (t = {t[j]} and {t[i]})"
    )
    if known:
        text += f"; without sampling noise {np.mean(known):.2f} on average"
    collinear = [value for value in known if value >= COLLINEAR]
    said = "Holds" if known and len(collinear) == len(fair) else "Does not hold" if not collinear else "Holds in part"
    return f"{text}. **{said} here.**"


def spectrum(rows: list[dict]) -> str:
    """Figures 3b and 3c: one eigenvalue dominates."""
    chosen = [row for row in rows if row["ratio"] <= DOMINANT]
    text = (
        f"The claim: lambda_1 is one or two orders of magnitude above the rest at every timestep, and lambda_2 / lambda_1 is lowest"
        f" ({PUBLISHED_RATIO}) at t = {PUBLISHED_RATIO_AT}. Here the ratio is {_range(rows, 'ratio')}"
    )
    for row in rows:
        if row["t"] == PUBLISHED_RATIO_AT:
            text += f", and {format_number(row['ratio'])} at t = {PUBLISHED_RATIO_AT}"
            text += (
                f", {row['ratio'] / PUBLISHED_RATIO:.0f} times the paper's" if row["ratio"] > PUBLISHED_RATIO else ""
            )
    shares = [{"t": row["t"], "top": row["eigenvalues"][0] / row["trace"], "v": _share(row)} for row in rows]
    return (
        f"{text}. lambda_1 is ten times lambda_2 {_at(rows, chosen)}. {_holds(rows, chosen)} Of the trace, the top eigenvector carries"
        f" {_range(shares, 'top')}, and v, the mean's direction, {_range(shares, 'v')}."
    )


def _share(row: dict) -> float:
    return row["second_moment"] / row["trace"]


def errors(rows: list[dict]) -> str:
    """Figure 3d: the rank-1 form is close, the diagonal is not."""
    chosen = [row for row in rows if row["rank1_error"] <= CLOSE]
    possible = [row for row in rows if row["best_rank1_error"] <= CLOSE]
    better = [row for row in rows if row["rank1_error"] < row["diagonal_error"]]
    far = [row for row in rows if row["diagonal_error"] >= COLLINEAR]
    return (
        f"The claim: the rank-1 form is close to F at mid and late timesteps, the diagonal's error is near 1.0 at every one. Here"
        f" the rank-1 form's error is {_range(rows, 'rank1_error')} (no vector does better than"
        f" {_range(rows, 'best_rank1_error')}), the diagonal's {_range(rows, 'diagonal_error')}. Some rank-1 matrix is within {CLOSE}"
        f" of F {_at(rows, possible)}, that of the mean gradient {_at(rows, chosen)}; it is nearer to F than the diagonal"
        f" {_at(rows, better)}. The diagonal's error is {COLLINEAR} or more {_at(rows, far)}. Rank-1 close: {_holds(rows, chosen)} Diagonal far: {_holds(rows, far)}"
    )


def stability(rows: list[dict]) -> str:
    """The critique's condition: what rank-1 leaves out is small beside what it keeps."""
    chosen = [row for row in rows if row["residual_share"] <= DOMINANT]
    return (
        f"The critique asks for |R| much below the eigengap, with R = F - m v v^T. |R| / m is {_range(rows, 'residual_share')}; a"
        f" tenth or less {_at(rows, chosen)}. {_holds(rows, chosen)} |cos| of v to F's top eigenvector is"
        f" {_range(rows, 'top_cosine')}."
    )


def noise(rows: list[dict]) -> str:
    """How well the mean is known."""
    weak = [row for row in rows if row["signal_ratio"] < 5]
    return (
        f"n |mu|^2 / trace is {_range(rows, 'signal_ratio')} with {rows[0]['num_samples']} draws a timestep (noise alone has 1);"
        f" the means of two halves of the draws have a cosine of {_range(rows, 'half_cosine')}. Below 5, where v is largely noise,"
        f" it is {_at(rows, weak)}."
    )


def linear(rows: list[dict]) -> str:
    """The critique's residual of the linear surrogate."""
    chosen = [row for row in rows if row["linear"] <= DOMINANT]
    near = [row for row in rows if row["scalar"] <= DOMINANT]
    return (
        f"The paper's Assumption 1 has the network linear, and a scalar times its input. On held-out draws the best scalar leaves"
        f" {_range(rows, 'scalar')} of |eps_theta|^2, ridge regression {_range(rows, 'linear')}. A scalar explains nine tenths"
        f" {_at(rows, near)}, a linear map {_at(rows, chosen)}. {_holds(rows, near)}"
    )


def _off_diagonal(matrix: list[list]) -> list[float]:
    return [v for i, row in enumerate(matrix) for j, v in enumerate(row) if j < i and v is not None]


def bands(found: dict) -> str:
    """Whether the bands' directions are one, and the tasks'."""
    share = found["trace_share"][-1]
    parts = [f"{BAND_NAMES[name]} {share[name]:.0%}" for name in BANDS]
    between = found["between_bands"][-1]["corrected"]
    names = list(BANDS)
    pairs = [
        f"{BAND_NAMES[names[i]]} and {BAND_NAMES[names[j]]} {'noise' if between[i][j] is None else f'{between[i][j]:.2f}'}"
        for i in range(3)
        for j in range(i)
    ]
    text = (
        f"Of the last task's second moment over all timesteps (its trace), the bands carry: {', '.join(parts)}. Cosines between the"
        f" bands' directions, without sampling noise: {', '.join(pairs)}."
    )
    if len(found["trace_share"]) < 2:
        return f"{text} The model has learned one task, so that there is no other one's direction to compare with."
    tasks = {name: _off_diagonal(found["between_tasks"][name]["corrected"]) for name in (*BANDS, ALL)}
    means = {name: float(np.mean(values)) for name, values in tasks.items() if values}
    said = [
        f"{BAND_NAMES[name]} {mean:.2f} ({min(tasks[name]):.2f} to {max(tasks[name]):.2f})"
        for name, mean in means.items()
    ]
    text += f" Between different tasks at these weights: {', '.join(said)}."
    if "low_snr" in means:
        critique = "is" if means["low_snr"] >= COLLINEAR else "is not"
        text += (
            f" The critique predicts a task-independent direction, near 1, at low SNR: that {critique} what is found."
        )
    return text


def stored(matrix: list[list[float]]) -> str:
    """The stored directions, each at its own task's weights."""
    values = [abs(value) for value in _off_diagonal(matrix)]
    if not values:
        return ""
    return (
        f"The directions that rank-1 EWC has stored, each at its own task's weights, have |cos| {np.mean(values):.2f} to each other on"
        f" average ({min(values):.2f} to {max(values):.2f})."
    )


def compared_rises(movement: dict) -> dict[str, float | None]:
    """Returns by how much the loss rises at the move `COMPARED_STEP`, by kind of direction; over all timesteps, and each band."""
    step, curves = movement["steps"].index(COMPARED_STEP), movement["curves"]

    def mean(group: list[list[float]]) -> float | None:
        return float(np.mean([rises(curve)[step] for curve in group])) if group else None

    found = {}
    for name in (ALL, *BANDS):
        found[f"own {name}"] = rises(curves[name]["own"])[step]
        found[f"others {name}"] = mean(curves[name]["others"])
    return found | {"random": mean(curves["random"]), "top_coordinates": mean(curves["top_coordinates"])}


def movement(found: dict) -> str:
    """What decides what the penalty protects: own v against the other directions."""
    rise, middle = compared_rises(found), len(found["curves"][ALL]["own"]) // 2
    own, loss = rise[f"own {ALL}"], found["curves"][ALL]["own"][middle]
    text = (
        f"At a move of {COMPARED_STEP} (the loss is {format_number(loss)} before) the loss of task {found['task']} rises by"
        f" {own:.2g} along its own v, by {rise['random']:.2g} along random directions and by {rise['top_coordinates']:.2g} along the"
        f" diagonal's top coordinates"
    )
    if rise[f"others {ALL}"] is None:
        return f"{text}. There is no other task's v to compare with."
    said = []
    for name in (ALL, *BANDS):
        said.append(f"{BAND_NAMES[name]} {rise[f'own {name}']:.2g} against {rise[f'others {name}']:.2g}")
    other = rise[f"others {ALL}"]
    verdict = (
        "its own v matters more to the task than the others' do: the penalty protects something of the task"
        if own > MORE * other
        else "another task's v does as much or more: what the penalty holds is a stiff direction of the network, not of the task"
        if other >= own
        else "another task's v does less, but not by a factor of two: little of what the penalty holds is the task's"
    )
    return f"{text}. Own v against other tasks' v, by band: {'; '.join(said)}. So {verdict}."


def gauss_newton(found: dict, moved: dict | None) -> str:
    """v against the curvature."""
    directions = found["directions"]
    said = [f"{BAND_NAMES[name]} {directions[name]['cosine']:.2f}" for name in (ALL, *BANDS)]
    values = ", ".join(format_number(value) for value in found["eigenvalues"])
    text = (
        f"The top eigenvalues of the Gauss-Newton matrix of task {found['task']}'s loss are {values} (residual of the first"
        f" {found['residual']:.1%}). |cos| of v to its top eigenvector: {', '.join(said)};"
        f" {directions[ALL]['share_in_block']:.0%} of v's square lies in the first {len(found['eigenvalues'])}."
    )
    if moved is not None:
        step = moved["steps"][1]
        curvature = 2 * rises(moved["curves"][ALL]["own"])[1] / step**2
        text += (
            f" The loss's curvature along v is {format_number(curvature)}; the second moment m along it is"
            f" {format_number(found['second_moment'])}, {curvature / found['second_moment']:.0f} times less."
        )
    return text
