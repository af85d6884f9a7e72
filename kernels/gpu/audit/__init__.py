"""`python -m sparselottery.kernels.gpu.audit`: are all kernels compiled as they are meant to be? See report.py."""
