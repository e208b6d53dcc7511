"""Triton's interpreter as the driver of a CPU, in every process: with it vLLM's newer model runner runs where no GPU is."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import torch
    from triton import backends, runtime
    from triton.backends.compiler import BaseBackend, GPUTarget

    class InterpretedDriver:
        """Answers what Triton and vLLM ask of a driver; nothing is ever compiled."""

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
