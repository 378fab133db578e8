"""Top-k, top-p and min-p one token at a time, in float64."""

import numpy as np


def kept(z, top_k=None, top_p=None, min_p=None):
    """Ids that survive for logits z [V]: top-k, then top-p of what is left, then min-p of what is left."""
    ids = sorted(range(len(z)), key=lambda i: (-z[i], i))[:top_k]
    weight = {i: np.exp(float(z[i]) - float(z[ids[0]])) for i in ids}
    if top_p is not None:
        total, before, some = sum(weight.values()), 0.0, []
        for i in ids:
            if before < top_p * total:
                some.append(i)
            before += weight[i]
        ids = some
    if min_p is not None:
        ids = [i for i in ids if weight[i] >= min_p * weight[ids[0]]]
    return sorted(ids)


def log_probs(z, **truncations):
    """[V] log-probs of what is sampled from: softmax over the kept ids, -inf elsewhere."""
    z, ids = np.asarray(z, np.float64), kept(z, **truncations)
    out = np.full(len(z), -np.inf)
    top = z[ids].max()
    out[ids] = z[ids] - top - np.log(np.exp(z[ids] - top).sum())
    return out
