"""The publications a card cites, by the name of the method."""

from __future__ import annotations

from hf_sage.publishing.facts import Paper

SAGE = Paper(
    title="Flatness and Gradient Alignment Are Both Necessary: Spectral-Aware Gradient-Aligned Exploration for "
    "Multi-Distribution Learning",
    authors="Aristotelis Ballas and Christos Diou",
    year=2026,
    url="https://arxiv.org/abs/2605.07914",
    bibtex="""@article{ballas2026sage,
  title   = {Flatness and Gradient Alignment Are Both Necessary: Spectral-Aware Gradient-Aligned
             Exploration for Multi-Distribution Learning},
  author  = {Ballas, Aristotelis and Diou, Christos},
  journal = {arXiv preprint arXiv:2605.07914},
  year    = {2026}
}""",
)

SAM = Paper(
    title="Sharpness-Aware Minimization for Efficiently Improving Generalization",
    authors="Pierre Foret, Ariel Kleiner, Hossein Mobahi and Behnam Neyshabur",
    year=2021,
    url="https://arxiv.org/abs/2010.01412",
    bibtex="""@inproceedings{foret2021sam,
  title     = {Sharpness-Aware Minimization for Efficiently Improving Generalization},
  author    = {Foret, Pierre and Kleiner, Ariel and Mobahi, Hossein and Neyshabur, Behnam},
  booktitle = {International Conference on Learning Representations},
  year      = {2021}
}""",
)

SWAD = Paper(
    title="SWAD: Domain Generalization by Seeking Flat Minima",
    authors="Junbum Cha, Sanghyuk Chun, Kyungjae Lee, Han-Cheol Cho, Seunghyun Park, Yunsung Lee and Sungrae Park",
    year=2021,
    url="https://arxiv.org/abs/2102.08604",
    bibtex="""@inproceedings{cha2021swad,
  title     = {{SWAD}: Domain Generalization by Seeking Flat Minima},
  author    = {Cha, Junbum and Chun, Sanghyuk and Lee, Kyungjae and Cho, Han-Cheol and Park, Seunghyun and
               Lee, Yunsung and Park, Sungrae},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2021}
}""",
)

DOMAINBED = Paper(
    title="In Search of Lost Domain Generalization",
    authors="Ishaan Gulrajani and David Lopez-Paz",
    year=2021,
    url="https://arxiv.org/abs/2007.01434",
    bibtex="""@inproceedings{gulrajani2021domainbed,
  title     = {In Search of Lost Domain Generalization},
  author    = {Gulrajani, Ishaan and Lopez-Paz, David},
  booktitle = {International Conference on Learning Representations},
  year      = {2021}
}""",
)

PAPERS = {"sage": SAGE, "sam": SAM}
"""The paper of each method that has one; of others a card names the method and no paper."""
