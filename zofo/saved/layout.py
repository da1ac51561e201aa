"""The names of the files and folders that a run leaves on disk."""

from __future__ import annotations

from typing import Final

CONFIG_FILE: Final = "run.yaml"


RESULT_FILE: Final = "result.json"


ADVICE_FILE: Final = "advise.json"


STOPPED_FILE: Final = "stopped.json"


STATE_FILE: Final = "trainer_state.json"
