"""The loop and what it needs: checkpoints, schedules, interruptions."""
