"""What a run reads under ``train`` (gn_detect.engine.lazy_config, gn_detect.engine.lazy); the keys
are Detectron2's where it has them."""

train = dict(
    output_dir="./output",
    # Weights to start from: a path, a URL, catalog://... or "" for random ones.
    init_checkpoint="",
    max_iter=90000,
    seed=-1,  # negative: another one in each run
    device="cuda",  # the CPU where there is no CUDA
    amp=dict(enabled=False, dtype="float16"),  # or "bfloat16"
    # Forward passes that share the images of dataloader.train.total_batch_size; their gradients
    # are averaged, so more of them need less memory and change nothing else.
    accumulate_steps=1,
    # Of DistributedDataParallel.
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    # A checkpoint every so many iterations; the newest of them are kept (0: all).
    checkpointer=dict(period=5000, max_to_keep=100),
    eval_period=0,  # iterations; 0: evaluate after the last one alone
    log_period=20,
    # What is refused before it wastes a run; False lets it pass.
    guards=dict(
        scratch_freeze_at=True,
        scratch_frozen_bn=True,
        bn_weights_into_gn=True,
        weights_input=True,
        weights_stride=True,
        weights_norm=True,
        weights_coverage=True,
    ),
)
