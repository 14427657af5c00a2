"""fastllm inside other libraries: one file a library, which is imported only when the file's functions are called."""
