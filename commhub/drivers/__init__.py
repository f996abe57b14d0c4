"""How exchanges are carried out: by a thread over Gloo, on a CUDA stream over NCCL, or among virtual ranks.

A driver never knows which hook it drives. README.md in this folder says where what is.
"""
