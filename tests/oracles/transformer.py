"""The decoder written out in numpy, float64: one unpadded sequence, one head at a time."""

import numpy as np


def _norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def _rotate(x, theta):
    """Rotary embedding of x [T, d]: pair (i, i + d/2) of position t turns by t * theta^(-2i/d)."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * theta ** (-2 * np.arange(half) / x.shape[-1])
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], -1)


def _attention(x, layer, config):
    """Causal attention of x [T, D]; query head h reads key head h // (heads / kv_heads)."""
    out = np.zeros_like(x)
    future = np.triu(np.ones((len(x), len(x)), bool), 1)
    for h in range(config.heads):
        g = h // (config.heads // config.kv_heads)
        q, k = _rotate(x @ layer["wq"][:, h], config.rope_theta), _rotate(x @ layer["wk"][:, g], config.rope_theta)
        score = np.where(future, -np.inf, q @ k.T / np.sqrt(config.head_dim))
        p = np.exp(score - score.max(-1, keepdims=True))
        out += p / p.sum(-1, keepdims=True) @ (x @ layer["wv"][:, g]) @ layer["wo"][h]
    return out


def logits(config, params, tokens):
    """[T, V]: row t predicts token t + 1."""
    params = {k: v if isinstance(v, dict) else np.asarray(v, np.float64) for k, v in params.items()}
    x = params["embedding"][np.asarray(tokens)]
    for i in range(config.layers):
        layer = {k: np.asarray(v[i], np.float64) for k, v in params["blocks"].items()}
        x = x + _attention(_norm(x, layer["attn_norm"], config.norm_eps), layer, config)
        h = _norm(x, layer["mlp_norm"], config.norm_eps)
        gate, up = h @ layer["w_in"][:, 0], h @ layer["w_in"][:, 1]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["w_down"]
    head = params["embedding" if config.tied else "head"]
    return _norm(x, params["final_norm"], config.norm_eps) @ head.T


def log_softmax(z):
    """Over the last axis."""
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))
