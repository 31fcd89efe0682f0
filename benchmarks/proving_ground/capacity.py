"""Capacity: what a delta rule gives back of 256 pairs after one read, and after two, with random keys and no training.

Keys, queries and values of a head are fixed random projections of random embeddings; what all heads read is decoded by
least squares. Of two steps, the second read asks with the decoded first. A trained memory can do better.

    python -m benchmarks.proving_ground.capacity
"""

import json

import torch
from torch import Tensor

WIDTH, KEYS, VALUES = 256, 4096, 256
"""Of the embeddings; different tokens that are keys, and that are values, as in `recall`."""
SHAPES = ((4, 64, 128), (8, 64, 128), (4, 128, 128), (16, 64, 64), (16, 64, 128), (8, 128, 128))
RATES = (0.5, 0.2, 0.1, 0.05)


def recalled(heads: int, key_dim: int, value_dim: int, rate: float, pairs: int = 256, rows: int = 6) -> list[float]:
    """Return the shares of right values of one step and of two, of `pairs` pairs a -> b and b -> c in mixed order."""
    generator, right, half = torch.Generator().manual_seed(0), torch.zeros(2), pairs // 2

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for _ in range(rows):
        a, b = torch.randperm(KEYS, generator=generator)[:pairs].chunk(2)
        c = torch.randint(VALUES, (half,), generator=generator)
        tokens, values = normal(KEYS, WIDTH), normal(VALUES, WIDTH)
        to_key, to_value = normal(heads, WIDTH, key_dim), normal(heads, WIDTH, value_dim)
        decode = torch.linalg.pinv(to_value.transpose(0, 1).flatten(1))

        def as_keys(x_ND: Tensor, to_key: Tensor = to_key) -> Tensor:
            return torch.nn.functional.normalize(x_ND @ to_key, dim=2)

        k_NPH, v_NPU = as_keys(tokens[torch.cat([a, b])]), torch.cat([tokens[b], values[c]]) @ to_value
        state_NHU = torch.zeros(heads, key_dim, value_dim, dtype=torch.float64)
        for pair in torch.randperm(pairs, generator=generator).tolist():
            k_N1H, v_N1U = k_NPH[:, pair, None], v_NPU[:, pair, None]
            state_NHU += rate * k_N1H.mT @ (v_N1U - k_N1H @ state_NHU)

        def read(q_NPH: Tensor, state_NHU: Tensor = state_NHU, decode: Tensor = decode) -> Tensor:
            return (q_NPH @ state_NHU).transpose(0, 1).flatten(1) @ decode

        for steps, found_PD in enumerate((read(k_NPH[:, half:]), read(as_keys(read(k_NPH[:, :half]))))):
            right[steps] += ((found_PD @ values.T).argmax(1) == c).double().mean()
    return [round(share, 3) for share in (right / rows).tolist()]


def main() -> None:
    """Print a line for each shape, and one of JSON."""
    print(f"{'heads, key, value':18} " + " ".join(f"{f'rate {rate:g}':>13}" for rate in RATES))
    found = {}
    for shape in SHAPES:
        found[str(shape)] = {rate: recalled(*shape, rate) for rate in RATES}
        print(
            f"{shape!s:18} " + " ".join(f"{one:6.3f} {two:6.3f}" for one, two in found[str(shape)].values()), flush=True
        )
    print(json.dumps({"task": "Capacity", "right_after_one_read_and_two": found, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
