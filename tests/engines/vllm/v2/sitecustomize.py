"""Register Triton's interpreter as the driver of a CPU.

Python imports this module at its start, in every process whose PYTHONPATH names its folder. It
lets vLLM's V2 model runner run without a GPU.
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import torch
    from triton import backends, runtime
    from triton.backends.compiler import BaseBackend, GPUTarget

    class InterpretedDriver:
        """The driver methods that Triton and vLLM call; nothing is ever compiled."""

        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int = 0) -> int:
            return device

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cpu", "x86", 32)

        def get_device_interface(self) -> object:
            return torch.cpu

    backends.backends["cpu"] = backends.Backend(BaseBackend, InterpretedDriver)
    runtime.driver.set_active(InterpretedDriver())
