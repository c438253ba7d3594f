"""The reused teacher classifier: the student learns the teacher's last features alone, and ends in the teacher's own
classifier (Chen et al., SimKD, CVPR 2022: arXiv 2203.14001).

The loss is the mean of (projector(s) - t)^2 over all elements, where s and t are the student's and the teacher's last
feature maps before pooling, the larger one averaged to the grid of the smaller one; neither labels nor the teacher's
logits are read. The student of such a run is put together by `blocks/reused.py`: its encoder, the projector, and the
teacher's classifier, which is not trained. The authors' classifier is the last linear layer behind a mean over all
places; here it is whatever follows the teacher's last map, which is the same in all networks that pool so.
"""

from stablekd_fast.objectives.methods import Method, add_method

add_method(
    "simkd",
    Method(align="all", logits="none", options={"feature": {"normalize": None}}, reuses_classifier=True),
)
