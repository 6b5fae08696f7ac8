"""What Horovod does to gradients and variables under Keras's TensorFlow backend."""

import horovod.tensorflow as hvd
import tensorflow as tf

Compression = hvd.Compression


def average(gradients: list, name: str, compression: type) -> list:
    """The mean over all ranks of each gradient. One named allreduce each: in a traced step they start as backprop
    produces them, and Horovod fuses those that wait together. None stays None."""
    return [
        gradient
        if gradient is None
        else hvd.allreduce(gradient, op=hvd.Average, name=f"{name}.{i}", compression=compression)
        for i, gradient in enumerate(gradients)
    ]


def broadcast(variables: list, root_rank: int, name: str) -> None:
    """Rank root_rank's values in floating-point Keras variables, on all ranks; one traced call, so they overlap."""

    @tf.function
    def assign_all() -> None:
        for i, v in enumerate(variables):
            v.value.assign(hvd.broadcast(v.value.read_value(), root_rank, name=f"{name}.{i}"))

    assign_all()


def use_local_device(local_rank: int, threads: int) -> None:
    """Gives this rank the GPU of its local rank, if there is one, and `threads` CPU threads."""
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        tf.config.set_visible_devices(gpus[local_rank], "GPU")
        tf.config.experimental.set_memory_growth(gpus[local_rank], True)
    tf.config.threading.set_intra_op_parallelism_threads(threads)
