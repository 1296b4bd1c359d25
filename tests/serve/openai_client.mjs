// OpenAI's JavaScript client against a server: node openai_client.mjs URL MODEL, run where `openai` is installed. Prints one
// JSON document of what it saw; tests/serve/test_javascript.py judges it.

import OpenAI from "openai";

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Alice was beginning to get very tired of sitting by her sister on the bank" }];
const wanted = { model, messages, max_completion_tokens: 12, temperature: 0 };
const seen = {};

seen.models = (await client.models.list()).data.map((m) => m.id);

const first = await client.chat.completions.create(wanted);
seen.text = first.choices[0].message.content;
const turns = [...messages, { role: "assistant", content: seen.text }, { role: "user", content: "And then?" }];
const second = await client.chat.completions.create({ ...wanted, messages: turns });
seen.usage = second.usage;

seen.streamed = "";
const stream = await client.chat.completions.create({ ...wanted, stream: true, stream_options: { include_usage: true } });
for await (const chunk of stream) {
  seen.streamed += chunk.choices[0]?.delta.content ?? "";
  seen.streamUsage = chunk.usage ?? seen.streamUsage;
}

seen.cancelledAfter = 0;
const long = await client.chat.completions.create({ ...wanted, max_completion_tokens: 4000, ignore_eos: true, stream: true });
for await (const _ of long) {
  seen.cancelledAfter += 1;
  if (seen.cancelledAfter === 3) long.controller.abort();
}

const tool = {
  type: "function",
  function: {
    name: "set_lamp",
    parameters: { type: "object", properties: { on: { type: "boolean" } }, required: ["on"], additionalProperties: false },
  },
};
const called = await client.chat.completions.create({ ...wanted, max_completion_tokens: 40, tools: [tool], tool_choice: "required" });
seen.call = called.choices[0].message.tool_calls[0];

const schema = {
  type: "object", properties: { colour: { enum: ["red", "green"] }, n: { type: "integer", minimum: 0, maximum: 9 } },
  required: ["colour", "n"], additionalProperties: false,
};
const formed = await client.chat.completions.create({
  ...wanted, max_completion_tokens: 60, response_format: { type: "json_schema", json_schema: { name: "thing", schema, strict: true } },
});
seen.formed = JSON.parse(formed.choices[0].message.content);

const response = await client.responses.create({ model, input: "Alice was", max_output_tokens: 8, temperature: 0, store: false });
seen.response = response.output_text;

try {
  await client.chat.completions.create({ ...wanted, model: "another" });
} catch (error) {
  seen.refusal = { status: error.status, type: error.type, name: error.constructor.name };
}

console.log(JSON.stringify(seen));
