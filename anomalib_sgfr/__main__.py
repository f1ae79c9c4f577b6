"""``python -m anomalib_sgfr ...``: anomalib's command line with Sgfr loaded, wherever the plugin is not.

``python -m anomalib_sgfr explain --help`` is Sgfr's own: the mimic view of a folder of images.
"""

import sys

from anomalib.cli.cli import main

import anomalib_sgfr.data
import anomalib_sgfr.lightning_model  # noqa: F401

if __name__ == "__main__":
    if sys.argv[1:2] == ["explain"]:
        from anomalib_sgfr.commands.explain import main as explain

        sys.exit(explain(sys.argv[2:]))
    main()
