"""Whether a replica's reports are believed: a leaky count of those that could not be true. Pure.

| report                                                        | count              | trusted                        |
|---------------------------------------------------------------|--------------------|--------------------------------|
| sound                                                         | one less, at least 0 | as before; again once it is 0 |
| nonsense, or a sequence number that was already used          | STRIKE more        | no longer, from QUARANTINE on  |

Three bad reports close together quarantine a replica; five seconds of sound ones at 4 Hz and it is believed again. A
replica in quarantine still gets settings: it serves, and its own governor sees what is true.
"""

from __future__ import annotations

from dataclasses import dataclass

STRIKE = 8  # sound reports that make up for a bad one
QUARANTINE = 20
MOST = 40  # however long it talked nonsense, so many sound reports redeem it


@dataclass(frozen=True, slots=True)
class Trust:
    count: int = 0
    is_trusted: bool = True

    def after(self, is_sound: bool) -> Trust:
        """What is thought of the replica after one more report."""
        if is_sound and self.count == 0 and self.is_trusted:
            return self
        count = max(self.count - 1, 0) if is_sound else min(self.count + STRIKE, MOST)
        return Trust(count, count == 0 if not self.is_trusted else count < QUARANTINE)
