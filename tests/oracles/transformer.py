"""The decoder written out in numpy, float64: one unpadded sequence, one head, one token's experts at a time."""

import numpy as np


def _norm(x, scale, config):
    scale = 1 + scale if config.norm_plus_one else scale
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale


def _cap(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)


def _frequency(config, local):
    """theta^(-2i/d), divided by the factor; Llama 3: only where few turns fit into the original length."""
    own = local and config.local_rope_theta is not None
    theta, scaling = (config.local_rope_theta, ()) if own else (config.rope_theta, config.rope_scaling)
    out = []
    for i in range(config.head_dim // 2):
        f = theta ** (-2 * i / config.head_dim)
        if scaling and scaling[0] == "linear":
            f /= scaling[1]
        elif scaling:
            _, factor, low, high, length = scaling
            wavelength = 2 * np.pi / f
            if wavelength > length / low:
                f /= factor
            elif wavelength > length / high:
                smooth = (length / wavelength - low) / (high - low)
                f = (1 - smooth) * f / factor + smooth * f
        out.append(f)
    return np.array(out)


def _rotate(x, frequency):
    """Rotary embedding of x [T, d]: pair (i, i + d/2) of position t turns by t * frequency_i."""
    half = x.shape[-1] // 2
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * np.arange(len(x))[:, None] * frequency)
    return np.concatenate([z.real, z.imag], -1)


def _attention(x, layer, config, local):
    """Causal attention of x [T, D]; query head h reads key head h // (heads / kv_heads)."""
    out = np.zeros_like(x)
    back = np.arange(len(x))[:, None] - np.arange(len(x))
    unseen = (back < 0) | (back >= config.window) if local else back < 0

    def project(name, head):
        y = x @ layer[f"w{name}"][:, head]
        y = y + layer[f"b{name}"][head] if config.qkv_bias else y
        return _norm(y, layer[f"{name}_norm"], config) if config.qk_norm and name != "v" else y

    for h in range(config.heads):
        g = h // (config.heads // config.kv_heads)
        q, k = (_rotate(project(name, i), _frequency(config, local)) for name, i in (("q", h), ("k", g)))
        scale = config.head_dim if config.query_scalar is None else config.query_scalar
        score = np.where(unseen, -np.inf, _cap(q @ k.T / np.sqrt(scale), config.attention_softcap))
        p = np.exp(score - score.max(-1, keepdims=True))
        out += p / p.sum(-1, keepdims=True) @ project("v", g) @ layer["wo"][h]
    return out


def _gated(x, w_in, w_down, config):
    gate, up = x @ w_in[:, 0], x @ w_in[:, 1]
    if config.activation == "silu":
        gate = gate / (1 + np.exp(-gate))
    else:
        gate = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    return gate * up @ w_down


def _mlp(x, layer, config):
    if config.experts is None:
        return _gated(x, layer["w_in"], layer["w_down"], config)
    out = np.zeros_like(x)
    for t, p in enumerate(np.exp(log_softmax(x @ layer["router"]))):
        chosen = np.argsort(-p)[: config.experts_per_token]
        total = p[chosen].sum() if config.norm_topk else 1
        out[t] = sum(p[e] / total * _gated(x[t], layer["w_in"][e], layer["w_down"][e], config) for e in chosen)
    return out


def logits(config, params, tokens):
    """[T, V]: row t predicts token t + 1."""
    params = {k: v if isinstance(v, dict) else np.asarray(v, np.float64) for k, v in params.items()}
    x = params["embedding"][np.asarray(tokens)]
    x = x * np.float32(config.width**0.5) if config.embedding_scaled else x
    for i in range(config.layers):
        layer = {k: np.asarray(v[i], np.float64) for k, v in params["blocks"].items()}
        local = config.window is not None and (config.local_layers is None or i in config.local_layers)
        h = _attention(_norm(x, layer["attn_norm"], config), layer, config, local)
        x = x + (_norm(h, layer["attn_post_norm"], config) if config.post_norms else h)
        h = _mlp(_norm(x, layer["mlp_norm"], config), layer, config)
        x = x + (_norm(h, layer["mlp_post_norm"], config) if config.post_norms else h)
    head = params["embedding" if config.tied else "head"]
    return _cap(_norm(x, params["final_norm"], config) @ head.T, config.final_softcap)


def log_softmax(z):
    """Over the last axis."""
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))
