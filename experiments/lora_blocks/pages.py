"""The page of a ``lora_blocks`` run: sections, and how to read them."""

from hooked_alm.methods.adapters.turning import LEAST_CLIPS

from ..materials.clips import of_whom
from ..materials.confounds import add_confounds
from ..workbench import figures
from ..workbench.page import Page
from ..workbench.results import having, parts_by
from .measure import SWITCHES, WAYS
from .tables import ERASURES, LoraResults, block_sizes

CAVEATS = (
    "A block alone shows what suffices, a block left out what is needed. Blocks that stand in for "
    "each other show in neither alone.",
    "An adapter that was trained in all blocks at once may share its work out: then no block "
    "carries it, and that is the finding.",
    "Norms, lenses and lengths describe; only the switches say what a block does to the answer.",
)
_HOW = {
    "denoise": "That block's update on, all others off: what it suffices for.",
    "noise": "That block's update off, all others on: what needs it.",
}
_INTERVAL = "Intervals are 95 % bootstrap intervals over clips."


def lead(run: LoraResults) -> str:
    """What was asked, with which adapter."""
    config, clips, items = run.config, run["manifest"], run["items"]
    moved = (items["lead_on"] - items["lead_off"]).abs() >= config.min_effect
    named = f"the adapter {config.lora}" if config.lora else "its adapter"
    return (
        f"{config.model} with {named} and without, on {len(clips)} clips, {of_whom(clips)}, under "
        f"{', '.join(config.conditions)}: {len(items)} items, of which the adapter moves "
        f"{int(moved.sum())} by {config.min_effect:g} logits or more. Then the update of one block "
        "is switched on alone, or off alone."
    )


def fill_page(page: Page, run: LoraResults) -> None:
    """What is answered, what blocks do, how large they are, and what is read by depth."""
    _answers(page, run)
    _blocks(page, run)
    _erased(page, run)
    _depths(page, run)
    _turned(page, run)
    _written(page, run)


def _answers(page: Page, run: LoraResults) -> None:
    page.section("What is answered")
    said = run["runs"].pivot(index=["condition", "item"], columns="way", values="prediction")
    who = run["items"].set_index(["condition", "item"])[["voice", "target"]]
    rows = [
        {"condition": condition, "items": len(part),
         **{f"{way} answers {what}": f"{(part[way] == part[column]).mean():.2f}"
            for column, what in (("voice", "the voice's label"), ("target", "the other"))
            for way in WAYS}}
        for condition, part in said.join(who).groupby("condition", sort=False)
    ]  # fmt: skip
    page.table("Shares of items, without the adapter and with it", rows)
    add_confounds(page, run["confounds"], run.config)


def _blocks(page: Page, run: LoraResults) -> None:
    page.section(
        "Block by block",
        "A recovery of 1 is all that the adapter does to the lead of one label over the other, 0 "
        "is nothing of it.",
    )
    means = having(run["block_means"], measure="recovery").dropna(subset="mean")
    for condition in run.config.conditions:
        some = having(means, condition=condition)
        if some.empty:
            page.note(f"Under {condition} the adapter moves no item by enough to be shared out.")
            continue
        page.figure(
            f"blocks__{condition}",
            figures.bars(some, "block", group="reading", x_label="block", y_label="recovery",
                         reference=0),
            some, f"What each block does under {condition}",
            f"{' '.join(f'{one}: {_HOW[one]}' for one in SWITCHES)} Mean over the items that the "
            f"adapter moves. {_INTERVAL}",
            "All blocks off is the base, all on the adapter, bit for bit.",
        )  # fmt: skip
    page.table("The block that does most, and how far it is ahead", "best_blocks")
    sizes = block_sizes(run).rename("frobenius").reset_index()
    page.figure(
        "sizes", figures.bars(sizes, "block", "frobenius", x_label="block",
                              y_label="Frobenius norm"), sizes,
        "How large each block's updates are",
        "All of a block's updates together, as one norm. Beside the figure above: a large update "
        "need not do anything.",
    )  # fmt: skip
    page.table("Norm and effect by rank, and how late the effect is", "size_ranks")
    page.table("Every update", "sizes")
    page.table("Directions with 90 % of the squares of what first factors write", "spectra")
    if len(run["shapley"]):
        shares = run["shapley"].groupby(["condition", "block"], sort=False)["value"].mean()
        page.table("Shapley values in logits, mean over items", shares.reset_index())


def _erased(page: Page, run: LoraResults) -> None:
    page.section(
        "Erasure",
        "What is left of a recogniser of voices when the updates of one block are taken out, or "
        "those of a block and of all below it: how often the voice's label is answered, how "
        "probable the answer is, and the loss of the voice's label. They are three findings, and "
        "no score is made of them.",
    )
    parts = [
        (part, {"title": names["condition"], "y_label": ERASURES[names["measure"]],
                "reference": float(part["whole"].iloc[0])})
        for names, part in parts_by(run["erasure"], "condition", "measure")
    ]  # fmt: skip
    page.figure(
        "erasure", figures.panels(figures.curves, parts, height=2.8, x="block", group="form"),
        run["erasure"], "Without one block's updates, or without all up to it",
        f"The line is the whole adapter; the last of the progressive ones is the base. {_INTERVAL}",
    )  # fmt: skip


def _turned(page: Page, run: LoraResults) -> None:
    page.section(
        "How far it is turned",
        "Debiased CKA of clips with the adapter and without: 1 where they are arranged alike, by "
        "their states or by the gradients of the voice's label's log-probability, averaged over "
        "the audio or at the readout.",
    )
    table = run["similarity"].assign(who=lambda t: t["span"] + ", " + t["of"])
    if table.empty:
        page.note(f"CKA needs {LEAST_CLIPS} clips at least.")
        return
    page.figure(
        "similarity",
        figures.curves(table.dropna(subset="cka"), "depth", "cka", group="who", reference=1,
                       x_label="depth (blocks passed)", y_label="CKA"),
        table, "How alike clips are arranged with the adapter and without",
        f"{table['n'].iloc[0]} clips, each once. Beside it in the numbers: the same of clips that "
        "are dealt out anew. An update that changes no answer can turn them, too.",
        "At depth 0 the states are the same.",
    )  # fmt: skip


def _depths(page: Page, run: LoraResults) -> None:
    page.section(
        "By depth",
        "A lens reads the stream at the readout at every depth, with the adapter and without.",
    )
    labels = {"lead": "lead of T over the voice (logits)", "kl": "KL to the last depth (nats)",
              "share": "moved, by its own length"}  # fmt: skip
    means = having(run["depth_means"], measure=[*labels])
    parts = [
        (part, {"title": names["condition"], "y_label": labels[names["measure"]]})
        for names, part in parts_by(means, "condition", "measure")
    ]
    page.figure(
        "depths", figures.panels(figures.curves, parts, height=3.0, x="depth", group="way",
                                 x_label="depth (blocks passed)"),
        means, "What a lens reads by depth",
        f"Lead, divergence from the last depth, and how far the adapter has moved the stream. "
        f"{_INTERVAL} An adapter that acts early may be read late, and the other way about.",
        "At the last depth the lens is the model.",
    )  # fmt: skip


def _written(page: Page, run: LoraResults) -> None:
    centred = run.inputs["centred"]
    page.section(
        "What blocks write",
        "Length of what attention and MLP add at the readout, as a share of the stream that enters "
        "the block"
        + (", each vector's mean taken off, which LayerNorm does too." if centred else "."),
    )
    some = having(run["contribution_means"], way="difference", measure=["attn", "mlp", "both"])
    parts = [(part, {"title": names["condition"]}) for names, part in parts_by(some, "condition")]
    drawing = figures.panels(
        figures.curves, parts, height=3.0, x="block", group="measure", reference=0,
        y_label="adapted − base",
    )  # fmt: skip
    page.figure(
        "contributions", drawing, some, "What the adapter changes in what blocks write",
        f"Differences of these shares within items. {_INTERVAL} A decoy writes, too.",
    )  # fmt: skip


def method(run: LoraResults) -> str:
    """How effects and intervals were made."""
    config = run.config
    return (
        f"Model: {config.model}, {config.dtype}. A lead is the score of T minus the voice's; under "
        "instructions that name no label, T is the label that a conflict would name. A block's run "
        "goes on from the stream that enters it. Recoveries are of items that the whole adapter "
        f"moves by {config.min_effect:g} logits or more. Intervals resample clips "
        f"{config.n_resamples} times with seed {config.seed}."
    )
