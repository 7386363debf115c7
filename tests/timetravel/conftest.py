# SPDX-License-Identifier: GPL-2.0-or-later
from tests.e2e.conftest import examples

__all__ = ["examples"]
