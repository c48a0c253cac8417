"""The paper that a card cites for a method."""

from __future__ import annotations

from hf_sage.methods import METHODS
from hf_sage.methods.citations import Citation
from hf_sage.publishing.facts import Paper
from hf_sage.publishing.papers import PAPERS


def paper_of(method: str) -> Paper | None:
    """The paper of a method by its name: in full where it is known so, else by what the method itself cites.

    A method of the user's own has none here, nor has one whose paper is not on arXiv and not known in full.
    """
    if method in PAPERS or method not in METHODS:
        return PAPERS.get(method)
    cited = Citation.of(METHODS[method])
    if cited.paper == Citation.of(METHODS["sage"]).paper:  # an ablation
        return PAPERS["sage"]
    if cited.paper is None or cited.arxiv is None:
        return None
    authors, _, year = cited.paper.rpartition(" ")
    url = f"https://arxiv.org/abs/{cited.arxiv}"
    entry = f"@misc{{{method}, author = {{{authors}}}, year = {{{year}}}, eprint = {{{cited.arxiv}}}, url = {{{url}}}}}"
    return Paper(f"arXiv {cited.arxiv}", authors, int(year), url, entry)
