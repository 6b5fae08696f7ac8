"""The pinned environment: `launch/install/install` builds `.venv` and proves that it works."""
