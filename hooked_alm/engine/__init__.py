"""Exact patch sweeps at the cost of the rows they reach.

A sweep asks one question at many cells. A cell can change nothing before its first position and
nothing below its block, so the engine keeps what a base run made (``record``, ``runs``), and
recomputes only the rows that a cell reaches (``rows``), all cells together in one pass over the
blocks (``sweep``). Edits are data (``cells``): what they say decides which cells climb together
(``planning``, ``groups``), in what of a block they run (``bundles``, ``blocks``), and which heads
attend anew (``mixing``). Nothing is called, copied to the device or waited for per cell.

Five rules, by number in the code:

1. *Rows*: only rows from the first patched position on, only from the patched block up.
2. *Donor splice*: a span replaced whole by a run that agrees before it *is* that run's span.
3. *One pass*: each cell joins at its own block; earlier keys and values are shared, not copied.
4. *Readout rows only*: the last block and the unembedding run where the metric looks.
5. *Share prefixes*: runs that agree on a prefix compute it once.

In an audio encoder a row is read by all of its window, or chunk, so that in place of rule 1 an edit
reaches these, one block up, and no other; rules 2 and 5 have nothing to offer there.
What the cells' last streams are heard as enters the decoder as an edit of its first block.
"""
