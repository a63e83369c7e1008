"""Display names of names in the results. Imports nothing, because the page needs no matplotlib."""

NAMES = {
    "observed": "trained with different seeds",
    "gaussian": "Gaussian rows",
    "random_model": "random-weights model",
    "reference": "matched reference",
    "llm": "the activations' own probe",
    "pca": "PCA",
}
