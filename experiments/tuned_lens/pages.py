"""The page of a ``tuned_lens`` run: sections, and how to read them."""

from ..workbench.page import Page
from . import figures
from .settings import SCORED
from .tables import LensResults

CAVEATS = (
    "Not causal: a translator learns to predict the output. That it reads an answer at a depth "
    "says that the answer could be decoded there, not that the model has settled or uses it. "
    "What is used, only patching shows.",
    "In distribution: translators know the prompts they were trained on, and prompts like "
    "them. On other instructions, languages or speakers they have to be trained, or judged, "
    "again.",
    "Groups: what is held out are whole groups. By default a group is a clip: its words under "
    "the same instructions were seen with other clips. The intervals resample held-out groups.",
    "Positions weigh by their number: the readout is one of many, and a lens that is close "
    "everywhere else need not be close there. At audio positions no model is trained to "
    "predict anything, yet where they are scored, most of the loss is theirs. Judge a lens "
    "where it is used; scored=readout trains on that position alone.",
)


def lead(run: LensResults) -> str:
    """What the two lenses are, and where the trained one is."""
    return (
        "The logit lens reads an inner depth with the model's own final norm and unembedding, "
        "as if no block followed. A tuned lens first passes it through an affine map, one per "
        "depth, trained to predict the model's output. This page compares the two on prompts "
        f"that no step trained on. The loss counts {SCORED[run.config.scored]}.\n\nThe "
        "trained lens is in the run's folder, under lens/."
    )


def fill_page(page: Page, run: LensResults) -> None:
    """Both lenses on held-out prompts, and the training."""
    depths = run["depths"]
    page.section("On held-out prompts")
    figures.add_curves(
        page, depths, "kl", "Distance from the output", "KL (nats)",
        "Mean KL(output || lens) on held-out prompts, with 95 % intervals over groups. Lower "
        "is closer; at the last depth both are the output itself.",
    )  # fmt: skip
    figures.add_curves(
        page, depths, "agrees", "Same top token as the output", "share of positions",
        "How often the lens' most likely token is the output's.",
    )  # fmt: skip
    figures.add_places(page, depths)
    page.table(
        "Depth from which the top token at the readout is the output's for good; earlier is "
        "logit minus tuned",
        run["settling"],
    )
    page.table("All depths and places, with intervals", "depths")
    page.section("Training")
    figures.add_training(page, run["training"])
    page.table(
        "Learnt, and learnt by heart: the end of training and held-out prompts (KL, nats)",
        "training_end",
    )


def method(run: LensResults) -> str:
    """How the lens was trained and judged."""
    config, training, options = run.config, run.config.training(), run.inputs["training"]
    n_tokens = int(run["training"].drop_duplicates("step").n_tokens.sum())
    held_out = run["held_out"]
    return (
        f"Model: {config.model}, {config.dtype}, {run.n_blocks} blocks, frozen. Trained "
        f"on {options['prompts']} prompts of {len(options['groups'])} groups "
        f"({options['tokens']} scored tokens, {n_tokens} with repeats): {training.n_steps} "
        f"steps of {config.prompts_per_step} prompts, {training.optimizer}, highest rate "
        f"{training.peak_rate:g}, weight decay {training.weight_decay:g}, gradient norm at "
        f"most {training.max_grad_norm:g}. Loss: KL(output || lens), mean over scored tokens, "
        f"added over depths; scored is {SCORED[config.scored]}. Judged on "
        f"{held_out.prompt.nunique()} prompts of {held_out.group.nunique()} other groups, "
        f"split with seed {config.seed}. Intervals resample groups {config.n_resamples} times."
    )
