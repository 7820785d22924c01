"""What confident decoding costs: ratios against the unwrapped model, measured side by side in one run.

    python -m benchmarks                     # every part that this machine can show
    python -m benchmarks step --batch 4      # one of them; --help lists them
    python -m benchmarks tensorrt            # engines, where there is a GPU

Each part prints a table and writes it, as Markdown and JSON, with the machine and the command, into --output.
"""
