"""Write the world's records.

    python -m data.world.make            # data/world/facts.json
    python -m data.world.make -o FILE
"""

import argparse
import json
from pathlib import Path

from data.world.make import records

FACTS = Path(__file__).parents[1] / "facts.json"


def text(rows):
    """A JSON list of the records, one a line."""
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def main():
    """Write the records and say how many there are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=FACTS)
    path = parser.parse_args().output
    rows = records.records(records.build())
    path.write_text(text(rows), encoding="utf-8")
    subjects = {row["requested_rewrite"]["subject"].lower() for row in rows}
    print(f"{path}: {len(rows)} records of {len(subjects)} subjects")


if __name__ == "__main__":
    main()
