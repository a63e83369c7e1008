"""List the SAEs of SAELens' catalogue, one in each line, and whether HUSAI can judge them.

    python scripts/analysis/list_saes.py
    python scripts/analysis/list_saes.py --model gpt2-small
    python scripts/analysis/list_saes.py --summary > docs/sources.md
    python scripts/analysis/list_saes.py --open sae-lens:gpt2-small-res-jb/blocks.8.hook_resid_pre

Columns are separated by tabs: name for --checkpoint, model, hook, width, architecture, loader, status, judged. The
script reads only the catalogue's names and the local hub cache; `-` means that neither states a value. --open downloads
files that the cache lacks, opens each SAE, and records it in docs/opened_saes.json. Exit 0 done, 2 bad input.
"""

import sys

from husai.runs.cli import Parser, run_main

HEAD = """# Checkpoint sources

`python scripts/analysis/list_saes.py --summary` writes this file. A test compares the two.

`--checkpoint` takes

- a checkpoint's folder or file, or a folder that holds some;
- `sae-lens:RELEASE/SAE_ID`, an SAE of SAELens' catalogue, read by SAELens' own loader;
- `hf:REPO[@REVISION]/PATH`, a file or folder of a repository on the Hugging Face hub.

Files come from the local hub cache. HUSAI downloads what the cache lacks, because the command names it. All
files of one repository come from one commit: the cached one, if there is one. Without a network, a name that
the cache lacks ends in one line and exit code 2. A results file cannot make HUSAI download.

Nothing that is downloaded can run. Pickles are read weights-only and archives without pickles, in SAELens'
loaders too. No path leaves its repository.

## SAELens' catalogue

SAELens {version} names these SAEs. *Named*: the catalogue has the SAE. *Tested on an imitation*: a test opens
an imitation of the loader's repositories, and encode and decode equal SAELens' own object to 1e-6. *Opened*:
someone opened the SAE itself (`list_saes.py --open`). *Judged*: the release check refuses no SAE of this kind;
it also needs three seeds of one condition. `python scripts/analysis/list_saes.py --model gpt2-small` prints the
SAEs one a line."""
BELOW = """The release check refuses transcoders. HUSAI opens them for encode and decode. A layer of a cross-layer
transcoder is opened with its decoders summed, as SAELens does it; its decode is no reconstruction.

SAELens' own object computes SAEs whose rows are scaled one by one (`layer_norm`, `constant_norm_rescale`),
SAEs of attention heads (`hook_z`, rows of all heads side by side) and matching pursuits. HUSAI's formulas
compute all others from the weights.

## What HUSAI refuses"""
COLUMNS = ("name", "model", "hook", "width", "architecture", "loader", "status", "judged")


def parse():
    p = Parser(__doc__)
    p.add_argument("--model", help="SAEs of this model alone")
    p.add_argument("--summary", action="store_true", help="print docs/sources.md")
    p.add_argument("--open", nargs="+", default=[], metavar="NAME", help="open these SAEs and record them")
    return p.parse_args()


def main() -> None:
    args = parse()
    from husai.dictionaries import catalogue

    if args.open:
        for entry in catalogue.record_opened(args.open):
            print("\n".join(f"{key:13}{value}" for key, value in entry.items()))
    elif args.summary:
        sys.stdout.write(document(catalogue.listed(args.model)))
    else:
        rows = [[getattr(sae, column) or "-" for column in COLUMNS] for sae in catalogue.listed(args.model)]
        print("\n".join("\t".join(row) for row in [COLUMNS, *rows]))


def document(saes: list) -> str:
    """Text of docs/sources.md: number of SAEs of each loader, by status."""
    import sae_lens

    from husai.dictionaries import catalogue, sources
    from husai.report.text import table

    rows = []
    for loader in sorted({sae.loader for sae in saes}):
        read = [sae for sae in saes if sae.loader == loader]
        tested = [sae for sae in read if sae.status in ("tested", "opened")]
        opened = [sae for sae in read if sae.status == "opened"]
        judged = sum(sae.judged == "yes" for sae in read)
        counts = [len(read), len(tested), len(opened), judged]
        rows.append([f"`{loader}`", catalogue.IMITATED.get(loader, "not read"), *map(str, counts)])
    totals = [str(sum(int(row[column]) for row in rows)) for column in range(2, 6)]
    rows.append(["all", "", *totals])
    header = ["loader", "what it reads", "named", "tested on an imitation", "opened", "judged"]
    lines = [*HEAD.format(version=sae_lens.__version__).splitlines(), "", *table(header, rows), ""]
    refused = [[f"`{setting}`", why] for setting, why in sources.REFUSED.items()]
    lines += [*BELOW.splitlines(), "", *table(["setting", "why"], refused)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_main(main)
