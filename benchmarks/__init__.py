"""What confident decoding costs: ratios against the unwrapped model, measured side by side in one run.

    python -m benchmarks                     # everything that this machine can show
    python -m benchmarks step --layers 28    # one part; --help lists them

Each part prints a table and writes it, as Markdown and JSON, with the machine and the command, into --output.
"""
