"""undistilled: plan, run and prove the whole DeepSeek-R1 on the hardware you have."""

__version__ = "0.1.0"
