"""``python -m anomalib_sgfr ...``: anomalib's command line with Sgfr loaded, wherever the plugin is not."""

from anomalib.cli.cli import main

import anomalib_sgfr.data
import anomalib_sgfr.lightning_model  # noqa: F401

if __name__ == "__main__":
    main()
