"""All benchmarks of the kernels in one run: against cuDNN, FlexAttention and a copy, side by side.

    python benchmarks/kernels.py --check --profile profile.json --output kernels.json

Every row is a ratio to its baseline at the same shape (above 1 is faster), next to the ratio it has to reach.
Operations are those on visible scores: ``4 * H_q * D * visible`` forward, 2.5 times that backward.
"""

from __future__ import annotations


def main() -> None:
    # Beside this file transformers takes it for the package ``kernels`` and imports it: it must not import it again.
    import accuracy
    import delta
    import harness
    import local_attention
    import merge
    import norms
    import standin

    parser = harness.arguments(__doc__)
    parser.add_argument("--check", action="store_true", help="also compare errors with float64 at full size")
    local_attention.add_profile(parser)
    args = parser.parse_args()
    rows = local_attention.measure(args.profile)
    rows += [row for operator in (merge, delta, standin, norms) for row in operator.measure()]
    errors = accuracy.measure() if args.check else {}
    harness.write_json(args.output, rows, error_over_pytorch=errors)
    accuracy.print_ratios(errors)
    harness.print_table(rows)


if __name__ == "__main__":
    main()
