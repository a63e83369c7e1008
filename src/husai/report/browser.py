"""Features to read: what `feature_examples` wrote, in the shape that the page shows."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from husai.report.evidence import Phase


class Partner(BaseModel):
    seed: int | str
    feature: int
    cosine: FiniteFloat


class Context(BaseModel):
    text: list[str]
    values: list[FiniteFloat]

    @property
    def peak(self) -> float:
        return max(self.values, default=0.0)

    def pieces(self) -> list[tuple[str, float, int]]:
        """(text, activation, shade 0 to 4) of each piece; line ends are made visible."""
        top = self.peak or 1.0
        shades = [0 if v <= 0 else 1 + min(3, int(4 * v / top)) for v in self.values]
        shown = [t.replace("\r", "").replace("\n", "↵ ") for t in self.text]
        return [*zip(shown, self.values, shades, strict=True)]

    def preview(self, before: int = 18, after: int = 44) -> list[tuple[str, float, int]]:
        """The strongest piece between `before` and `after` characters; padded, so that peaks stand below each other."""
        pieces = self.pieces()
        i = max(range(len(pieces)), key=lambda j: pieces[j][1])
        left, right = ("".join(p[0] for p in part) for part in (pieces[:i], pieces[i + 1 :]))
        return [(left[-before:].rjust(before), 0.0, 0), pieces[i], (right[:after], 0.0, 0)]


class Feature(BaseModel):
    feature: int
    firing_rate: FiniteFloat
    stable: bool
    partners: list[Partner]
    contexts: list[Context]

    @property
    def least(self) -> float | None:
        """|cos| with the partner in the seed that has found it least."""
        return min((p.cosine for p in self.partners), default=None)


class Browser(BaseModel):
    """What `feature_examples` wrote; further keys are ignored."""

    model_config = ConfigDict(extra="ignore")

    condition: str
    subject: str
    hook_name: str
    seeds: list[int | str]
    alive: int
    alive_stable: int
    heldout_tokens: int
    stable_from: FiniteFloat
    features: list[Feature]

    @classmethod
    def of(cls, run: Phase) -> Browser | None:
        """None, and a problem of the run, where it holds no features."""
        try:
            browser = cls.model_validate(run.results)
            if any(len(c.text) != len(c.values) or not c.text for f in browser.features for c in f.contexts):
                raise ValueError("pieces without values")
            browser.features.sort(key=lambda f: (not f.stable, -(f.least or 0)))
            return browser
        except (ValidationError, ValueError):
            if run.results:
                run.problems.append("results.json holds no features in the shape that is expected")
            return None
