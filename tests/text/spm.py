"""SentencePiece's BPE as llama.cpp does it, by the book: of all neighbours whose union is a token, those whose token
has the best score are joined first, the leftmost first where two are equal."""


def encode(text: str, tokens: list[str], scores: list[float], kinds: list[int], prefix: bool) -> list[int]:
    """The ids of a text without control tokens. Tokens of a user (kind 4) are found first, the longest first;
    characters without a token are spelled in bytes."""
    known = {t: i for i, t in enumerate(tokens)}
    whole = sorted((t for t, k in zip(tokens, kinds, strict=True) if k == 4), key=len, reverse=True)
    out, rest = [], ""
    i = 0
    while i < len(text):
        found = next((t for t in whole if text.startswith(t, i)), None)
        if found is None:
            rest, i = rest + text[i], i + 1
            continue
        out += _piece(rest, known, scores, kinds, prefix) + [known[found]]
        rest, i = "", i + len(found)
    return out + _piece(rest, known, scores, kinds, prefix)


def _piece(text: str, known: dict[str, int], scores: list[float], kinds: list[int], prefix: bool) -> list[int]:
    if not text:
        return []
    parts = list(((" " if prefix else "") + text).replace(" ", "\u2581"))
    while True:
        pairs = [(a + b, i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))]
        joined = [(scores[known[p]], -i) for p, i in pairs if p in known and kinds[known[p]] == 1]
        if not joined:
            break
        i = -max(joined)[1]
        parts[i : i + 2] = ["".join(parts[i : i + 2])]
    out = []
    for part in parts:
        out += [known[part]] if part in known else [known[f"<0x{b:02X}>"] for b in part.encode()]
    return out
